"""What every test may use: a tiny random base model with its tokenizer, a few rows, the command line in a process.

Nothing here needs a network, and nothing is written outside pytest's temporary folders.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: one thread (results must not depend on the core count), no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = (
    "the capital of France is Paris",
    "what is the colour of the sky? the sky is blue",
    "two plus three is five, four plus four is eight",
    "translate the word: one, two, three",
    "user assistant system",
)


def write_tiny_tokenizer(folder: str | Path, *, vocab_size: int = 300) -> Any:
    """Writes a byte-level BPE tokenizer with ChatML's template; pad and end of text are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def write_tiny_base(folder: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """Writes a two-layer random float32 Llama (hidden 32, 4 heads, 2 for keys and values, tied head) and a tokenizer.

    ``config`` overrides single fields of the LlamaConfig; another ``seed`` gives other weights of the same shapes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = write_tiny_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # wide enough that a wrong layer shows in the logits
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    model.save_pretrained(str(folder))
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models, hashes and rendered data of the tests stay out of the user's cache folder."""
    before = os.environ.get("VENEER_CACHE")
    os.environ["VENEER_CACHE"] = str(tmp_path_factory.mktemp("veneer-cache"))
    yield
    if before is None:
        del os.environ["VENEER_CACHE"]
    else:
        os.environ["VENEER_CACHE"] = before


@pytest.fixture(scope="session")
def make_tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_tiny_base(seed=1, hidden_size=16, ...)`` writes another tiny Llama and returns its folder."""

    def make(**config: Any) -> Path:
        return write_tiny_base(tmp_path_factory.mktemp("base"), **config)

    return make


@pytest.fixture(scope="session")
def tiny_base(make_tiny_base: Callable[..., Path]) -> Path:
    """The folder of a two-layer random Llama with a ChatML tokenizer of 300 tokens. Read only: it is shared."""
    return make_tiny_base()


def tiny_examples() -> list[dict[str, str]]:
    """24 short prompt/completion rows with prompts that all differ."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    spelled = [{"prompt": f"spell {n}", "completion": words[n]} for n in range(12)]
    following = [{"prompt": f"what follows {n}?", "completion": str(n + 1)} for n in range(12)]
    return spelled + following


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of :func:`tiny_examples`. Read only: it is shared."""
    path = tmp_path_factory.mktemp("rows") / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_examples()), encoding="utf-8")
    return path


@pytest.fixture
def veneer(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``veneer("train", "recipe.yaml", ...)`` runs the command line in its own process, by default in ``tmp_path``."""

    def run(
        *arguments: str | Path,
        cwd: Path = tmp_path,
        env: dict[str, str] | None = None,
        stdin: str = "",
        timeout: int = 300,
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "VENEER_DEBUG", "COLUMNS")}
        return subprocess.run(
            [sys.executable, "-m", "veneer", *map(str, arguments)],
            cwd=cwd,
            env={**environment, "NO_COLOR": "1", **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
