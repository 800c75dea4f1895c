"""One run over a base in 4 bits and one over plain weights, to be merged. Read only: they are shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapters import LoraConfig, attach
from veneer.models import load_base
from veneer.train import train


@pytest.fixture(scope="session")
def wide_base(make_tiny_base: Callable[..., Path]) -> Path:
    """A tiny Llama whose rows are whole blocks of 64."""
    return make_tiny_base(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="session")
def moe_base(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-MoE of four experts, whose shared expert's gate has one row."""
    from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

    folder = tmp_path_factory.mktemp("moe")
    tokenizer = AutoTokenizer.from_pretrained(wide_base)
    tokenizer.save_pretrained(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings))
    model.save_pretrained(str(folder))
    return folder


def train_run(base: Path, rows: Path, folder: Path, quantize: str | None) -> Path:
    """20 steps in float32 on 18 of the tiny rows; the other six are held out."""
    model = attach(
        load_base(base, dtype="float32", device="cpu", quantize=quantize), LoraConfig(r=8, lora_alpha=16), seed=0
    )
    settings = {"max_steps": 20, "learning_rate": 1e-2, "max_length": 64, "samples": 0}
    return train(model, rows, eval_data=6, output_dir=folder, **settings).path


@pytest.fixture(scope="session")
def qlora_run(wide_base: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(wide_base, tiny_rows, tmp_path_factory.mktemp("qlora") / "run", "nf4")


@pytest.fixture(scope="session")
def lora_run(wide_base: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(wide_base, tiny_rows, tmp_path_factory.mktemp("lora") / "run", None)
