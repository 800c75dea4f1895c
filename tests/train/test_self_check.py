"""The check before the first step, as a run makes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import lines

from veneer.errors import TrainError
from veneer.kernels import heap, native, rms_norm


def test_an_operation_that_is_off_stops_the_run_before_anything_is_written(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = rms_norm._RmsNorm.backward
    monkeypatch.setattr(
        rms_norm._RmsNorm,
        "backward",
        staticmethod(lambda ctx, dy: (2 * backward(ctx, dy)[0], None, None, None)),
    )
    with pytest.raises(TrainError, match=r"RMSNorm: the gradient of x differs by 100\.0% from its float32 reference"):
        small_run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_explains_itself_and_is_the_same_run(
    small_run: Callable[..., Any], tmp_path: Path, packing: bool
) -> None:
    train = {"max_steps": 2, "packing": packing}
    _, plain = small_run("plain", train=train)
    _, watcher = small_run("explained", train=train, adapter={"r": 4, "lora_dropout": 0.1}, explain=True, strict=True)
    small_run("dropout", train=train, adapter={"r": 4, "lora_dropout": 0.1})
    assert lines(tmp_path / "dropout") == lines(tmp_path / "explained")
    said = [text for _, text in watcher.messages if text.startswith("how this run computes")]
    assert len(said) == 1
    rows, memory = "packed" if packing else "padded", heap.description()
    for word in ("float32", "LlamaRMSNorm", rows, memory, "RMSNorm", "cross entropy", "limit"):
        assert word in said[0]
    covered = [text for _, text in watcher.messages if text.startswith("what the adapter changes")]
    assert len(covered) == 1
    assert "q_proj" in covered[0]
    recorded = json.loads((tmp_path / "plain" / "run.json").read_text())["hardware"]
    assert (recorded["memory"], recorded["kernels"]) == (memory, native.description())
    assert not [text for _, text in plain.messages if "how this run computes" in text]
