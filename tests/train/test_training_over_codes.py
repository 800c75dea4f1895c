"""QLoRA through the whole loop: training over codes is training over the numbers that the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import lines

from veneer.models import load_base
from veneer.quant import QuantizedLinear


@pytest.fixture
def decoded(tiny_base: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """``decoded("nf4", "float32")``: a folder with the plain weights that the codes of the tiny base stand for."""

    def make(scheme: str, dtype: str) -> Path:
        base = load_base(tiny_base, dtype=dtype, quantize=scheme, device="cpu")
        for path, layer in list(base.module.named_modules()):
            if isinstance(layer, QuantizedLinear):
                parent, _, name = path.rpartition(".")
                setattr(base.module.get_submodule(parent), name, layer.dequantized())
        folder = tmp_path / f"decoded-{scheme}-{dtype}"
        base.module.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_series_is_that_of_the_decoded_base(
    small_run: Callable[..., Any],
    decoded: Callable[[str, str], Path],
    tmp_path: Path,
    scheme: str,
    dtype: str,
    tolerance: float,
    checkpointing: bool,
) -> None:
    settings = {"train": {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 4}, "dtype": dtype}
    small_run("codes", quantize=scheme, **settings)
    small_run("plain", base=str(decoded(scheme, dtype)), **settings)
    codes, plain = (
        [(line["step"], line[key]) for line in lines(tmp_path / name) for key in ("loss", "eval_loss") if key in line]
        for name in ("codes", "plain")
    )
    assert len(codes) > 10
    assert [step for step, _ in codes] == [step for step, _ in plain]
    assert [loss for _, loss in codes] == pytest.approx([loss for _, loss in plain], rel=tolerance)
    assert codes[-1][1] < codes[0][1]


def test_the_run_says_how_its_base_is_stored(small_run: Callable[..., Any], tmp_path: Path) -> None:
    _, watcher = small_run(quantize="nf4")
    assert any("tensors in nf4" in text and "bits per parameter" in text for _, text in watcher.messages)
    assert "nf4" in (tmp_path / "run" / "recipe.yaml").read_text()
