"""Small random models for trying recipes where no model can be downloaded.

    python -m benchmarks.tiny_bases

writes two bases with a tokenizer each, for ``recipes/moe.yaml`` and ``recipes/hybrid.yaml``: ``runs/tiny/moe``
(transformers' Qwen3-MoE, eight experts) and ``runs/tiny/hybrid`` (Bamba: state spaces and one layer of attention).
Their weights are random, so a run shows that an architecture trains, not what a trained model would know.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).parents[1] / "recipes" / "data" / "tickets-train.jsonl"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "moe": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}),
    "hybrid": (
        "Bamba",
        {"attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
}


def write_base(folder: Path, name: str, seed: int = 0) -> Path:
    """Writes the base ``name`` of :data:`BASES` with its tokenizer into ``folder``."""
    import torch
    import transformers

    architecture, settings = BASES[name]
    tokenizer = _tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=len(tokenizer), **ids, **COMMON | settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer over the repository's own rows, with ChatML's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_bases", description="Small random bases.")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny"), help="the folder of the bases")
    folder = parser.parse_args(arguments).output
    for name in BASES:
        print(write_base(folder / name, name))


if __name__ == "__main__":
    main()
