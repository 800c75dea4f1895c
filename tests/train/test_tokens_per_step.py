"""Steps of as many rows as a budget of tokens holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import Watcher, lines

from veneer.errors import RecipeError


def test_steps_keep_to_the_budget_and_epochs_take_every_row(small_run: Callable[..., Any], tmp_path: Path) -> None:
    _, watcher = small_run(train={"tokens_per_step": 120})
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert watcher.started[0][0] == len(steps) > 2
    assert any("rows of up to 120 tokens a step" in text for _, text in watcher.messages)
    stats = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stats["plan"]["tokens_per_step"] == 120
    assert all(0 < line["tokens"] <= 120 for line in steps)
    assert sum(line["rows"] for line in steps) == 2 * 20
    assert max(line["rows"] for line in steps) < 8  # that many rows would have more tokens


@pytest.mark.parametrize("layout", [{"packing": False}, {"micro_batch_tokens": 64}])
def test_the_layout_in_memory_changes_nothing(
    layout: dict[str, Any], small_run: Callable[..., Any], tmp_path: Path
) -> None:
    small_run("one", train={"tokens_per_step": 150, "max_steps": 4})
    small_run("other", train={"tokens_per_step": 150, "max_steps": 4, **layout})
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "other")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_that_was_stopped_goes_on_with_the_same_rows(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tokens_per_step": 120, "save_steps": 1}
    small_run("whole", train=settings)

    def step(self: Watcher, values: Mapping[str, Any]) -> None:
        if values["step"] == 4:
            raise RuntimeError("the machine went down")

    with monkeypatch.context() as patched:
        patched.setattr(Watcher, "step", step)
        with pytest.raises(RuntimeError, match="went down"):
            small_run("stopped", train=settings)
    small_run("stopped", resume=True, train=settings)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_number_of_rows_beside_it_is_refused(recipe: Callable[..., Any]) -> None:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        with pytest.raises(RecipeError, match=r"counts the rows of a step, and train\.tokens_per_step its tokens"):
            recipe(train={"tokens_per_step": 100, name: 3})
    recipe(train={"tokens_per_step": 100, "packing": False, "per_device_train_batch_size": 2})


def test_steps_of_rows_are_said_as_before(small_run: Callable[..., Any]) -> None:
    _, watcher = small_run(train={"max_steps": 1})
    assert any("8 rows a step" in text for _, text in watcher.messages)
