"""A run that was stopped, however rudely, goes on as if it had not been: the same losses, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import lines

from veneer.errors import TrainError, UsageError
from veneer.recipe import Recipe

# Dropout, noise, metrics over windows that cross checkpoints, evaluations, a last incomplete step.
SETTINGS: dict[str, Any] = {
    "adapter": {"r": 4, "lora_dropout": 0.2},
    "train": {
        "max_steps": 120,
        "learning_rate": 3e-3,
        "max_length": 64,
        "neftune_noise_alpha": 5.0,
        "save_steps": 7,
        "eval_steps": 10,
        "logging_steps": 3,
    },
}


def wait_for(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Returns when ``metrics`` has a line of ``step`` or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        text = metrics.read_text() if metrics.exists() else ""
        if text.count("\n") and json.loads(text[: text.rindex("\n")].splitlines()[-1])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError("the run did not get there")


def same_run(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    last = "step-000120"
    optimizers = [(run / "checkpoints" / last / "optimizer.safetensors").read_bytes() for run in (one, other)]
    assert optimizers[0] == optimizers[1]


def kill_and_resume(
    kills: int,
    small_run: Callable[..., Any],
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    small_run("whole", **SETTINGS)
    recipe = write_recipe("killed", **SETTINGS)
    run = tmp_path / "killed"
    step = 0
    for kill in range(kills):
        step = random.randint(step + 1, step + 90 // kills)
        process = start_train(recipe, *(["--resume"] if kill else []))
        wait_for(process, run / "metrics.jsonl", step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"killed at step {step}"
        assert json.loads((run / "run.json").read_text())["status"] == "running"
    process = start_train(recipe, "--resume")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming from step-" in output or "training begins at the first step" in output
    same_run(tmp_path / "whole", run)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_kill_9_at_a_random_step_and_resume_is_the_run_that_never_stopped(
    small_run: Callable[..., Any],
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    kill_and_resume(1, small_run, write_recipe, start_train, tmp_path)


@pytest.mark.slow
def test_kill_9_three_times_over_and_resume_is_the_run_that_never_stopped(
    small_run: Callable[..., Any],
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    kill_and_resume(3, small_run, write_recipe, start_train, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_writes_a_checkpoint_exits_130_and_the_run_can_go_on(
    number: signal.Signals,
    small_run: Callable[..., Any],
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    recipe = write_recipe("stopped", **SETTINGS)
    run = tmp_path / "stopped"
    process = start_train(recipe)
    wait_for(process, run / "metrics.jsonl", 12)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "interrupted"
    assert 12 <= info["training"]["steps"] < 120
    assert (run / "checkpoints" / f"step-{info['training']['steps']:06d}" / "COMPLETE").exists()
    small_run("stopped", resume=True, **SETTINGS)
    small_run("whole", **SETTINGS)
    same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_a_stop_of_two_processes_writes_one_checkpoint_that_goes_on(
    small_run: Callable[..., Any],
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    settings = {**SETTINGS, "train": {**SETTINGS["train"], "per_device_train_batch_size": 4}}
    run = tmp_path / "stopped"
    process = start_train(write_recipe("stopped", **settings), processes=2)
    wait_for(process, run / "metrics.jsonl", 9)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "interrupted"
    steps = info["training"]["steps"]
    assert (run / "checkpoints" / f"step-{steps:06d}" / "COMPLETE").exists()
    again = start_train(write_recipe("stopped", **settings), "--resume", processes=2)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    numbers = [line["step"] for line in lines(run) if "loss" in line]
    assert numbers == list(range(3, 121, 3)), "no line is missing or double"


@pytest.mark.parametrize("at", [1, 2, 7, 20, 21])
def test_a_stop_at_any_step_resumes_bit_for_bit(
    at: int, small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops before and after the first epoch's end, between two lines of metrics, and where an evaluation is due."""
    settings = {**SETTINGS, "train": {**SETTINGS["train"], "max_steps": 24, "eval_steps": 4}}
    small_run("whole", **settings)
    stop_after(at, monkeypatch)
    stopped, _ = small_run("stopped", **settings)
    assert stopped.interrupted
    assert stopped.steps == at
    monkeypatch.undo()
    resumed, watcher = small_run("stopped", resume=True, **settings)
    assert watcher.started == [(24, at, "stopped")]
    assert not resumed.interrupted
    one, two = tmp_path / "stopped", tmp_path / "whole"
    assert lines(one) == lines(two)
    file = Path("adapter", "adapter_model.safetensors")
    assert (one / file).read_bytes() == (two / file).read_bytes()


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for a stop while step number ``step`` is computed, as a Ctrl-C would."""
    import veneer.train.loop as loop

    original = loop.train_step

    def train_step(t: Any, prepare: Any) -> bool:
        if t.state.step + 1 == step:
            t.stop.requested = True
        return original(t, prepare)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_ctrl_c_during_an_evaluation_repeats_it_after_the_resume(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.train import held_out, session
    from veneer.train.interrupt import EvaluationInterrupted

    settings = {"train": {"max_steps": 8, "eval_steps": 2, "max_length": 64}}
    small_run("whole", **settings)
    original = held_out.held_out_loss
    calls = []

    def interrupted(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:  # the base, step 2, and now step 4
            raise EvaluationInterrupted
        return original(*arguments)

    monkeypatch.setattr(session, "held_out_loss", interrupted)
    result, _ = small_run("stopped", **settings)
    assert result.interrupted
    assert result.steps == 4
    monkeypatch.undo()
    # As if the run had been resumed, had finished that evaluation, and had then been killed.
    with open(tmp_path / "stopped" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "epoch": 1.2, "eval_loss": 9.0}) + '\n{"step": 5, "lo')
    small_run("stopped", resume=True, **settings)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_still_ends_the_same(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "train": {**SETTINGS["train"], "max_steps": 24, "save_total_limit": None}}
    small_run("whole", **settings)
    stop_after(17, monkeypatch)
    small_run("stopped", **settings)
    monkeypatch.undo()
    newest = tmp_path / "stopped" / "checkpoints" / "step-000017"
    with open(newest / "optimizer.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    (newest.parent / ".step-000020.x.tmp").mkdir()
    _, watcher = small_run("stopped", resume=True, **settings)
    assert watcher.started[0][1] == 14
    said = "checkpoint step-000017 is passed over: optimizer.safetensors is damaged (its hash differs)"
    assert ("info", said) in watcher.messages
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    left = [sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("stopped", "whole")]
    assert left[0] == left[1], "the damaged one is gone, and so is what a kill left"


def test_a_run_without_a_checkpoint_begins_anew_on_resume(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    small_run("whole")
    small_run("lost")
    shutil.rmtree(tmp_path / "lost" / "checkpoints")
    _, watcher = small_run("lost", resume=True)
    assert ("info", "there is no whole checkpoint: training begins at the first step") in watcher.messages
    assert lines(tmp_path / "lost") == lines(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(small_run: Callable[..., Any], tmp_path: Path) -> None:
    first, _ = small_run()
    before = lines(tmp_path / "run")
    again, watcher = small_run(resume=True)
    assert watcher.steps == []
    assert (again.steps, again.best_step, again.metrics) == (first.steps, first.best_step, first.metrics)
    assert lines(tmp_path / "run") == before


def test_resume_without_a_run_is_refused(small_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        small_run(resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"learning_rate": 2e-2}}, "train.learning_rate: 0.01 -> 0.02"),
        ({"adapter": {"r": 8}}, "adapter.r: 4 -> 8"),
        ({"train": {"per_device_train_batch_size": 4}}, "rows per optimizer step"),
        ({"data": {"eval": 3}}, "the rows of data.train"),
    ],
)
def test_another_recipe_does_not_go_on_with_the_run(
    changes: dict[str, Any], named: str, small_run: Callable[..., Any], tmp_path: Path
) -> None:
    small_run()
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(TrainError, match="a resumed run goes on as it began") as caught:
        small_run(resume=True, **changes)
    assert named in caught.value.what
    assert "--overwrite" in str(caught.value.fix)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_another_base_does_not_go_on_with_the_run(
    small_run: Callable[..., Any], make_tiny_base: Callable[..., Path]
) -> None:
    small_run()
    with pytest.raises(TrainError, match="the base's weights"):
        small_run(resume=True, base=str(make_tiny_base(seed=1)))


def test_the_layout_and_the_places_may_change_on_resume(
    small_run: Callable[..., Any], recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = small_run("whole")
    stop_after(3, monkeypatch)
    small_run()
    monkeypatch.undo()
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "packing": False, "save_steps": 2}
    result, watcher = small_run(resume=True, train=other)
    assert watcher.started[0][1] == 3
    assert result.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-5)
