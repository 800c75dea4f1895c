"""One run over a base in 4 bits and one over plain weights, to be merged. Read only: they are shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.adapters import LoraConfig, attach
from veneer.models import load_base
from veneer.train import train


@pytest.fixture(scope="session")
def wide_base(make_tiny_base: Callable[..., Path]) -> Path:
    """A tiny Llama whose rows are whole blocks of 64."""
    return make_tiny_base(hidden_size=64, intermediate_size=128)


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
