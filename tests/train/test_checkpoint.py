"""Checkpoints are whole or do not count."""

import errno
import json
from pathlib import Path

import pytest
import torch

from veneer.errors import StorageError, TrainError
from veneer.train.checkpoint import (
    checkpoint_path,
    checkpoints,
    discard_after,
    load_checkpoint,
    newest_checkpoint,
    rotate,
    save_checkpoint,
)


def write(folder: Path, step: int, *, disk_is_full: bool = False) -> Path:
    def save_adapter(target: Path) -> None:
        target.mkdir()
        (target / "adapter_model.safetensors").write_bytes(bytes([step % 256]) * 100)
        if disk_is_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    return save_checkpoint(
        folder,
        step,
        state={"step": step, "loss": 0.1 + 0.2, "best_value": None},
        optimizer={"exp_avg": torch.arange(5.0) * step, "steps": torch.tensor([float(step)])},
        optimizer_layout="abc",
        rng={"cpu": torch.get_rng_state()},
        save_adapter=save_adapter,
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, 123)
    assert path.name == "step-000123"
    found = load_checkpoint(path)
    assert found.state == {"step": 123, "loss": 0.1 + 0.2, "best_value": None}
    assert torch.equal(found.optimizer["exp_avg"], torch.arange(5.0) * 123)
    assert found.optimizer_layout == "abc"
    assert torch.equal(found.rng["cpu"], torch.get_rng_state())
    assert (found.adapter / "adapter_model.safetensors").read_bytes() == bytes([123]) * 100


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    names = {path.name for path in write(tmp_path, 1).rglob("*") if path.is_file()}
    assert names == {
        "COMPLETE",
        "trainer.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "COMPLETE").unlink(), "it was not finished"),
        (lambda p: (p / "COMPLETE").write_text("{"), "its COMPLETE file cannot be read"),
        (lambda p: (p / "trainer.json").write_text("{}"), "trainer.json is damaged"),
        (lambda p: (p / "adapter/adapter_model.safetensors").unlink(), "adapter/adapter_model.safetensors is missing"),
        (lambda p: (p / "optimizer.safetensors").write_bytes(b"short"), "optimizer.safetensors is damaged"),
        (lambda p: (p / "COMPLETE").write_text("{}"), "it has no trainer.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path: Path, damage: object, reason: str) -> None:
    write(tmp_path, 10)
    damaged = write(tmp_path, 20)
    damage(damaged)  # type: ignore[operator]
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == checkpoint_path(tmp_path, 10)
    assert len(said) == 1
    assert "step-000020 is passed over" in said[0]
    assert reason in said[0]
    with pytest.raises(TrainError, match="the checkpoint is unusable"):
        load_checkpoint(damaged)


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent", pytest.fail) is None
    (tmp_path / "step-000001").mkdir()
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    assert said == ["checkpoint step-000001 is passed over: it was not finished"]


def test_a_full_disk_leaves_the_old_checkpoint_and_says_where_it_is(tmp_path: Path) -> None:
    good = write(tmp_path, 10)
    with pytest.raises(StorageError) as caught:
        write(tmp_path, 20, disk_is_full=True)
    assert (
        caught.value.what
        == f"the checkpoint of step 20 could not be written: the disk is full; the last good checkpoint is {good}"
    )
    assert "free some space" in str(caught.value.fix)
    assert [path for _, path in checkpoints(tmp_path)] == [good]
    assert list(tmp_path.iterdir()) == [good], "nothing half-written stays"
    assert load_checkpoint(good).state["step"] == 10


def test_a_full_disk_while_replacing_the_same_step_keeps_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with pytest.raises(StorageError):
        write(tmp_path, 10, disk_is_full=True)
    assert load_checkpoint(checkpoint_path(tmp_path, 10)).state["step"] == 10


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints(folder)]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
        rotate(tmp_path, 2, best_step=5)
    assert steps(tmp_path) == [5, 15, 20]
    rotate(tmp_path, 1, best_step=15)
    assert steps(tmp_path) == [15, 20]


def test_rotation_never_removes_the_last_good_one_for_an_unfinished_one(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (tmp_path / "step-000010").mkdir()
    rotate(tmp_path, 1, best_step=None)
    assert steps(tmp_path) == [5]


def test_rotation_without_a_limit_keeps_all_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    (tmp_path / ".step-000015.x1.tmp").mkdir()
    rotate(tmp_path, None, best_step=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005", "step-000010"]


def test_a_limit_of_zero_still_keeps_one(tmp_path: Path) -> None:
    write(tmp_path, 5)
    rotate(tmp_path, 0, best_step=None)
    assert steps(tmp_path) == [5]


def test_a_kill_while_a_checkpoint_is_replaced_does_not_lose_it(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    aside = tmp_path / ".step-000005.ab12.old"
    aside.mkdir()
    path.rename(aside / "old")
    assert newest_checkpoint(tmp_path, pytest.fail) == path


def test_a_resumed_run_discards_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    discard_after(tmp_path, 10)
    assert steps(tmp_path) == [5, 10]


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (tmp_path / "step-final").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    rotate(tmp_path, 1, best_step=None)
    assert steps(tmp_path) == [5]
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "step-final").exists()
    assert json.loads((tmp_path / "step-000005" / "COMPLETE").read_text())
