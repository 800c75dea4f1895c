"""What a run writes down as it goes: a line of metrics per step, the state of the run, and word to whoever watches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from veneer.errors import StorageError, TrainError, UsageError
from veneer.files import storage_errors, write_text
from veneer.run import RunFolder, RunInfo, Status, utc_now
from veneer.train.progress import Progress
from veneer.train.track import Tracker, numbers


class RunRecord:
    """The main process's record of a run; the loop's :class:`~veneer.train.loop.Recorder`.

    Args:
        folder: the run folder, which exists.
        info: what goes into ``run.json``.
        progress: is told everything.
        trackers: get the numbers.
    """

    def __init__(self, folder: RunFolder, info: RunInfo, progress: Progress, trackers: Sequence[Tracker]) -> None:
        self.folder, self.info, self.progress, self.trackers = folder, info, progress, trackers
        with storage_errors(folder.metrics_path):
            self._metrics: IO[str] = open(folder.metrics_path, "a", encoding="utf-8")  # noqa: SIM115  # closed in close()

    def step(self, values: Mapping[str, Any]) -> None:
        self._line(values)
        self.progress.step(values)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        self._line(values)
        self.progress.evaluation(values)

    def message(self, text: str, level: str = "info") -> None:
        """Said to whoever watches; warnings are kept in ``run.json`` too."""
        warnings: list[str] = self.info.extra.setdefault("warnings", [])
        if level == "warning" and text not in warnings:
            warnings.append(text)
            self.info.write(self.folder)
        self.progress.message(text, level)

    def close(self, status: Status, error: str | None = None) -> None:
        """The last word: ``run.json`` with its final status; trackers and files are closed.

        A disk that is full by now must not hide the error that ended the run.
        """
        self.info.status, self.info.error, self.info.finished = status, error, utc_now()
        try:
            self._metrics.close()
            self.info.write(self.folder)
        except (StorageError, OSError):
            if error is None:
                raise
        finally:
            for tracker in self.trackers:
                tracker.close()

    def _line(self, values: Mapping[str, Any]) -> None:
        # Flushed line by line: a kill loses none that a checkpoint counts on.
        with storage_errors(self.folder.metrics_path):
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
        for tracker in self.trackers:
            tracker.log(int(values["step"]), numbers(values))


class SilentRecord:
    """The record of every process but the first."""

    def step(self, values: Mapping[str, Any]) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def message(self, text: str, level: str = "info") -> None: ...


def cut_metrics(path: Path, step: int, evaluation_due: bool) -> None:
    """Takes out of ``metrics.jsonl`` what a run resumed at ``step`` will write again.

    Args:
        evaluation_due: the evaluation of ``step`` itself will be repeated.
    """
    if not path.exists():
        return
    kept = [
        line
        for line in read_metrics(path)
        if line["step"] < step or (line["step"] == step and not (evaluation_due and "eval_loss" in line))
    ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that a kill cut in half does not count."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def check_output(folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Refuses an output folder that would be destroyed or cannot be written, before anything long has begun.

    Raises:
        TrainError: it holds a run, and neither ``resume`` nor ``overwrite`` says what to do with it; or it is no run,
            and holds files under the names of one.
        UsageError: there is nothing to resume.
        StorageError: it cannot be written.
    """
    path = folder.path
    if resume and overwrite:
        raise TrainError("resume and overwrite exclude each other", where=str(path), fix="choose one of them")
    if path.exists() and not path.is_dir():
        raise StorageError("the output folder is a file", where=str(path), fix="set output_dir to another name")
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise StorageError(
            "a file is in the way of a folder", where=str(existing), fix="set output_dir to another name"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(
            "no permission to write here", where=str(existing), fix="set output_dir to a folder that you may write to"
        )
    if resume and not folder.run_json.exists():
        raise UsageError(
            "there is nothing to resume: the output folder holds no run",
            where=str(path),
            fix="leave --resume out, or give the output_dir of the run that was interrupted",
        )
    if folder.run_json.exists():
        if not (resume or overwrite):
            raise TrainError(
                "the output folder holds a run already",
                where=str(path),
                fix="go on with it (--resume), replace it (--overwrite), or set output_dir to another name",
            )
    elif strangers := [found.name for found in _own_paths(folder) if found.exists()]:
        # A folder that is no run, "." perhaps: what lies there under our names belongs to somebody else.
        raise TrainError(
            f"the output folder is no run, but holds {', '.join(strangers)}, which a run would replace",
            where=str(path),
            fix="set output_dir to another name, or move them away",
        )


def clear_run(folder: RunFolder) -> None:
    """Removes what a run wrote, and nothing else that lies in the folder."""
    for path in _own_paths(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    folder.run_json.unlink(missing_ok=True)


def _own_paths(folder: RunFolder) -> list[Path]:
    """What a run writes, beside ``run.json``, which is what makes a folder a run."""
    return [
        folder.recipe_path,
        folder.metrics_path,
        folder.adapter,
        folder.checkpoints,
        folder.eval_folder,
        folder.report,
        folder.path / "tensorboard",
    ]
