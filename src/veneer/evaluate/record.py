"""What a run folder holds, read for the report: run.json, metrics.jsonl, recipe.yaml and the evaluations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from veneer.errors import DataError, UsageError
from veneer.evaluate.evaluation import FORMAT, Evaluation

FIX_JSON = "restore the file, or delete it and run the command that wrote it again"


@dataclass(frozen=True)
class Answers:
    """Sample answers that the model gave at one step of its training."""

    step: int
    samples: list[dict[str, Any]]  # row_id, prompt, reference, prediction


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it; every part but the folder may be empty."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)  # run.json
    steps: list[dict[str, Any]] = field(default_factory=list)  # lines of training, by rising step
    held_out: list[dict[str, Any]] = field(default_factory=list)  # lines of evaluation, by rising step
    recipe: str = ""  # recipe.yaml as it stands
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by the file's stem
    answers: list[Answers] = field(default_factory=list)  # by rising step
    not_shown: list[str] = field(default_factory=list)  # files of eval/ that are neither
    adapter_bytes: int | None = None

    def section(self, name: str) -> dict[str, Any]:
        """A part of run.json that is a mapping; empty where it is missing."""
        value = self.info.get(name)
        return value if isinstance(value, dict) else {}


def read_run(folder: str | PathLike[str]) -> RunRecord:
    """Reads a run folder.

    Raises:
        UsageError: not a run folder.
        DataError: one of its files is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError("there is no such run folder", where=str(path), fix="give the folder that veneer train wrote")
    known = ("run.json", "recipe.yaml", "metrics.jsonl")
    if not any((path / name).exists() for name in known):
        raise UsageError(
            "this folder is not a run: it has none of " + ", ".join(known),
            where=str(path),
            fix="give the folder that veneer train wrote",
        )
    info = _json(path / "run.json") if (path / "run.json").exists() else {}
    if not isinstance(info, dict):
        raise DataError("run.json is not an object", where=str(path / "run.json"), fix=FIX_JSON)
    steps, held_out = _metrics(path / "metrics.jsonl")
    evaluations: dict[str, Evaluation] = {}
    answers = {
        int(line["step"]): Answers(int(line["step"]), line["samples"]) for line in held_out if _has_samples(line)
    }
    not_shown = []
    for file in sorted((path / "eval").glob("*.json")):
        value = _json(file)
        if isinstance(value, dict) and value.get("format") == FORMAT:
            evaluations[file.stem] = Evaluation.from_dict(value, where=str(file))
        elif isinstance(value, dict) and _has_samples(value):
            answers[int(value["step"])] = Answers(int(value["step"]), value["samples"])
        else:
            not_shown.append(file.name)
    recipe = path / "recipe.yaml"
    adapter = path / "adapter"
    return RunRecord(
        folder=path,
        info=info,
        steps=steps,
        held_out=held_out,
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
        evaluations=evaluations,
        answers=[answers[step] for step in sorted(answers)],
        not_shown=not_shown,
        adapter_bytes=sum(file.stat().st_size for file in adapter.iterdir()) if adapter.is_dir() else None,
    )


def headline_evaluation(record: RunRecord) -> tuple[Evaluation, str] | None:
    """The evaluation and the metric that the verdict speaks of.

    The evaluation is one with a base beside the adapter, of the most rows; the metric is the recipe's where it was
    measured.
    """
    if not record.evaluations:
        return None
    chosen = max(record.evaluations.values(), key=lambda found: (found.compared, len(found.rows)))
    settings = record.section("recipe").get("eval")
    wanted = settings.get("metric_for_best") if isinstance(settings, dict) else None
    return chosen, wanted if wanted in chosen.metrics else chosen.headline()


def points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """``(step, value)`` of the lines that have a finite number under ``key``."""
    found = []
    for line in lines:
        value = line.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((float(line["step"]), float(value)))
    return found


def _has_samples(value: dict[str, Any]) -> bool:
    samples = value.get("samples")
    return isinstance(value.get("step"), int) and isinstance(samples, list) and len(samples) > 0


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of training and of evaluation, by rising step.

    A resumed run writes the steps after its checkpoint again: the later line counts. A last line without its end is one
    that a killed process was writing, and is left out.
    """
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    training: dict[int, dict[str, Any]] = {}
    evaluation: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            step = int(value["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise DataError(
                f"a line of the metrics cannot be read: {error}", where=f"{path}:{number}", fix="delete the line"
            ) from error
        if any(key.startswith("eval_") for key in value):
            evaluation[step] = value
        else:
            training[step] = value
    return [training[step] for step in sorted(training)], [evaluation[step] for step in sorted(evaluation)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"the file is not JSON: {error}", where=str(path), fix=FIX_JSON) from error
