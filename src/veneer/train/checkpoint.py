"""Checkpoints that are whole or do not count: one folder per step, written beside its place and renamed into it.

    checkpoints/step-000123/
        adapter/                 the adapter, in PEFT's format
        optimizer.safetensors    the moments, flat, with the layout's hash as metadata
        rng.safetensors          the states of torch's generators
        hook.safetensors         what the adapter's variant keeps between steps, where it keeps something
        trainer.json             step, rows consumed, best value, early-stop counters, guards
        COMPLETE                 {file: SHA-256} of everything above

Rotation keeps the newest ones and the best one, and never removes a checkpoint before its successor is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from veneer.errors import StorageError, TrainError
from veneer.files import atomic_folder, sha256_file, storage_errors, write_json

COMPLETE, HOOK = "COMPLETE", "hook.safetensors"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, read and verified."""

    path: Path
    state: dict[str, Any]  # trainer.json
    optimizer: dict[str, Tensor]
    optimizer_layout: str
    rng: dict[str, Tensor]
    hook: dict[str, Tensor]

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in a run's ``checkpoints/``."""
    return folder / f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    state: dict[str, Any],
    optimizer: dict[str, Tensor],
    optimizer_layout: str,
    rng: dict[str, Tensor],
    hook: dict[str, Tensor] | None = None,
    save_adapter: Callable[[Path], object],
) -> Path:
    """Writes the checkpoint of ``step``; one that is there already is replaced once the new one is whole.

    Args:
        folder: the run's ``checkpoints/``.
        hook: the state of the step's :class:`~veneer.train.step_hook.StepHook`.
        save_adapter: writes the adapter into the folder it is given.

    Raises:
        StorageError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, step)
    with _explained(target, step), atomic_folder(target) as temporary:
        save_adapter(temporary / "adapter")
        _write_tensors(temporary / "optimizer.safetensors", optimizer, {"layout": optimizer_layout})
        _write_tensors(temporary / "rng.safetensors", rng)
        if hook:
            _write_tensors(temporary / HOOK, hook)
        write_json(temporary / "trainer.json", state)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes = {path.relative_to(temporary).as_posix(): sha256_file(path) for path in files}
        write_json(temporary / COMPLETE, hashes)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after its files have been compared with their hashes.

    Raises:
        TrainError: it is incomplete or damaged.
    """
    reason = defect(path)
    if reason is not None:
        raise TrainError(
            f"the checkpoint is unusable: {reason}",
            where=str(path),
            fix="resume without naming it: the newest whole checkpoint is taken",
        )
    optimizer, metadata = _read_tensors(path / "optimizer.safetensors")
    rng, _ = _read_tensors(path / "rng.safetensors")
    hook = _read_tensors(path / HOOK)[0] if (path / HOOK).is_file() else {}
    state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    return Checkpoint(path, state, optimizer, metadata.get("layout", ""), rng, hook)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a run's ``checkpoints/`` by step, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; each newer one that is not is passed over with a message."""
    _put_back(folder)
    for _, path in reversed(checkpoints(folder)):
        reason = defect(path)
        if reason is None:
            return path
        say(f"checkpoint {path.name} is passed over: {reason}")
    return None


def _put_back(folder: Path) -> None:
    """A kill in the moment when a checkpoint is replaced leaves the old one of that step set aside."""
    for aside in folder.glob(".step-*.old/old"):
        match = re.match(r"\.(step-\d+)\.", aside.parent.name)
        if match and not (folder / match.group(1)).exists():
            os.replace(aside, folder / match.group(1))


def defect(path: Path) -> str | None:
    """Why a checkpoint cannot be used, in a few words, or None when it is whole."""
    try:
        expected = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError):
        return f"its {COMPLETE} file cannot be read"
    for name in ("trainer.json", "optimizer.safetensors", "rng.safetensors"):
        if name not in expected:
            return f"it has no {name}"
    for name, digest in expected.items():
        try:
            if sha256_file(path / name) != digest:
                return f"{name} is damaged (its hash differs)"
        except OSError:
            return f"{name} is missing"
    return None


def rotate(folder: Path, keep: int | None, best_step: int | None) -> list[Path]:
    """Removes old checkpoints: the ``keep`` newest whole ones stay, and the best one.

    Unfinished leftovers of a killed process go too. ``keep=None`` keeps all that are whole.

    Returns:
        The folders that were removed.
    """
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = checkpoints(folder)
    whole = [step for step, path in found if (path / COMPLETE).is_file()]
    kept = set(whole if keep is None else whole[-max(1, keep) :])
    if best_step is not None:
        kept.add(best_step)
    removed = [path for step, path in found if step not in kept]
    for path in removed:
        # The marker first: what a kill leaves behind must not look whole.
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return removed


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints beyond ``step``: a resumed run writes them anew, and damaged ones must not be counted."""
    for later, path in checkpoints(folder):
        if later > step:
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    # Through Python's own file, so that a full disk is an OSError that says so.
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(cpu, metadata=metadata))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextlib.contextmanager
def _explained(target: Path, step: int) -> Iterator[None]:
    """A failed write names the checkpoint that the run can go on from."""
    try:
        with storage_errors(target):
            yield
    except StorageError as error:
        good = [path for _, path in checkpoints(target.parent) if (path / COMPLETE).is_file()]
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"
        raise StorageError(
            f"the checkpoint of step {step} could not be written: {error.what}; {kept}",
            where=str(target),
            fix="free some space (or lower train.save_total_limit), then go on with --resume",
        ) from error
