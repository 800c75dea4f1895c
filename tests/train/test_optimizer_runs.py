"""The optimizers in whole runs: `train.optim` reaches them, they learn, and a run that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import lines
from safetensors import safe_open
from test_resume import stop_after

from veneer.errors import RecipeError, TrainError

SETTINGS: dict[str, Any] = {"max_steps": 12, "learning_rate": 1e-2, "max_length": 64, "save_steps": 4}


def test_an_8_bit_run_learns_and_its_checkpoint_holds_codes(small_run: Callable[..., Any], tmp_path: Path) -> None:
    _, watcher = small_run(train={**SETTINGS, "optim": "adamw_8bit"})
    losses = [line["loss"] for line in watcher.steps]
    assert losses[-1] < 0.9 * losses[0]
    with safe_open(tmp_path / "run" / "checkpoints" / "step-000012" / "optimizer.safetensors", "pt") as file:
        held = {name: str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert held == {
        "exp_avg": "torch.uint8",
        "exp_avg_absmax": "torch.float32",
        "exp_avg_sq": "torch.uint8",
        "exp_avg_sq_absmax": "torch.float32",
        "steps": "torch.float32",
    }
    (said,) = [text for _, text in watcher.messages if text.startswith("train.optim")]
    assert said.startswith("train.optim adamw_8bit:")


def test_an_8_bit_run_that_was_stopped_goes_on_bit_for_bit(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "optim": "adamw_8bit"}
    small_run("whole", train=settings)
    stop_after(7, monkeypatch)
    stopped, _ = small_run("stopped", train=settings)
    assert stopped.steps == 7
    monkeypatch.undo()
    small_run("stopped", resume=True, train=settings)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000012/optimizer.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_paged_run_on_the_cpu_is_the_unpaged_one_and_says_that_nothing_is_paged(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {**SETTINGS, "max_steps": 3}
    _, quiet = small_run("unpaged", train=settings)
    _, watcher = small_run("paged", train={**settings, "optim": "paged_adamw"})
    assert lines(tmp_path / "paged") == lines(tmp_path / "unpaged")
    assert any("there is nothing to page" in text for _, text in watcher.messages)
    assert not any(text.startswith("train.optim") for _, text in quiet.messages)


def test_another_optimizer_does_not_go_on_with_the_run(small_run: Callable[..., Any]) -> None:
    small_run(train={**SETTINGS, "max_steps": 2})
    with pytest.raises(TrainError, match=r"train\.optim: adamw -> adamw_8bit"):
        small_run(resume=True, train={**SETTINGS, "max_steps": 2, "optim": "adamw_8bit"})


def test_an_optimizer_that_does_not_run_here_is_refused_before_anything_is_rendered_or_written(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.train import session

    def render(*arguments: Any) -> None:
        raise AssertionError("the rows were rendered")

    monkeypatch.setattr(session, "render_rows", render)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match="bitsandbytes' optimizer for CUDA"):
        small_run(device="auto", train={**SETTINGS, "optim": "adamw_bnb_8bit"})
    assert not (tmp_path / "run").exists()
