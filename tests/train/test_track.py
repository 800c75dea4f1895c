"""Trackers are imported when asked for, and say how to get them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from veneer.errors import UsageError
from veneer.train.track import check_trackers, numbers, open_trackers


def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="unknown tracker 'wand'") as caught:
        check_trackers(["wand"])
    assert "wandb" in str(caught.value.fix)


def test_a_tracker_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="mlflow is not installed") as caught:
        open_trackers(["mlflow"], Path("unused"), "run", {})
    assert caught.value.fix == "pip install mlflow, or take it out of train.report_to"


def test_none_asked_for_is_none_opened() -> None:
    assert open_trackers([], Path("unused"), "run", {}) == []


def test_tensorboard_writes_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracker is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard"], tmp_path, "run", {"train": {"seed": 1}})
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.value for e in events.Scalars("grad_norm")] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_recipe_flat_and_the_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    fake = ModuleType(name)
    fake.init = lambda **kw: calls.append(("init", kw))  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append(("log", (step, values)))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    (tracker,) = open_trackers([name], tmp_path, "my-run", {"train": {"seed": 1}, "base": "b"})
    tracker.log(3, {"loss": 0.5})
    tracker.close()
    opened: dict[str, Any] = {"project": "veneer", "name": "my-run", "config": {"train.seed": 1, "base": "b"}}
    if name == "wandb":
        opened["dir"] = str(tmp_path)
    assert calls == [
        ("init", opened),
        ("log", (3, {"loss": 0.5})),
        ("finish", None),
    ]


def test_mlflow_gets_parameters_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake = ModuleType("mlflow")
    fake.start_run = lambda run_name: calls.append(("start", run_name))  # type: ignore[attr-defined]
    fake.log_params = lambda values: calls.append(("params", values))  # type: ignore[attr-defined]
    fake.log_metrics = lambda values, step: calls.append(("metrics", (step, values)))  # type: ignore[attr-defined]
    fake.end_run = lambda: calls.append(("end", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    (tracker,) = open_trackers(["mlflow"], tmp_path, "my-run", {"adapter": {"r": 4}})
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert calls == [
        ("start", "my-run"),
        ("params", {"adapter.r": "4"}),
        ("metrics", (1, {"loss": 2.0})),
        ("end", None),
    ]


def test_only_numbers_are_tracked() -> None:
    assert numbers({"step": 3, "loss": 1, "kind": "train", "flag": True, "rate": 0.5}) == {"loss": 1.0, "rate": 0.5}
