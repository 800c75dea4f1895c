"""Small random models with a tokenizer each, for trying what an architecture does where nothing can be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from veneer.files import atomic_folder, cache_dir, sha256_json, storage_errors
from veneer.inbox.tickets import TRAIN_ROWS, labelled_rows
from veneer.models.bundled import RANDOM
from veneer.models.strict import quiet

MAKER = 1  # raise when the making changes: older folders are then not used any more

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
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_folder(alias: str) -> Path:
    """The Hugging Face folder of a model of :data:`RANDOM`, made in the cache folder where it is not there yet.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    key = sha256_json([MAKER, RANDOM[alias], COMMON])[:12]
    folder = cache_dir() / "models" / f"{alias}-{key}"
    if not folder.exists():
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                if not folder.exists():  # another process may have made it while we waited
                    with atomic_folder(folder) as temporary:
                        write_random(temporary, alias)
    return folder


def write_random(folder: Path, alias: str, seed: int = 0) -> None:
    """Writes a model of :data:`RANDOM` with its tokenizer; the weights depend on alias and seed alone."""
    import torch
    import transformers

    architecture, settings = RANDOM[alias]
    tokenizer = _tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=len(tokenizer), **ids, **COMMON | settings)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer over the demo's messages, with ChatML's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((row["text"] for row in labelled_rows(TRAIN_ROWS)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
