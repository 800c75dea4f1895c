"""Going on with a run: is it the same run, and from which checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.errors import TrainError
from veneer.recipe import Recipe, load_recipe
from veneer.run import RunFolder, RunInfo
from veneer.train.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint

# What may change between the sessions of a run without making it another run: where things are, how rows lie in
# memory, what is written down. Bases and data are compared by their hashes and not by their names.
FREE_TO_CHANGE = frozenset(
    {
        "base",
        "revision",
        "device",
        "output_dir",
        "data.train",
        "data.eval",
        "train.per_device_train_batch_size",
        "train.gradient_accumulation_steps",
        "train.micro_batch_tokens",
        "train.packing",
        "train.gradient_checkpointing",
        "train.save_steps",
        "train.save_total_limit",
        "train.report_to",
        "eval.samples",
    }
)


def check_same_run(folder: RunFolder, recipe: Recipe, info: RunInfo) -> None:
    """Refuses to go on with a run under settings that would make it another one.

    Args:
        info: of the session that is about to begin, with base, data and plan filled in.

    Raises:
        TrainError: the base, the data or a setting has changed; all changes are named.
    """
    before = RunInfo.read(folder)
    changes = recipe_changes(load_recipe(folder.recipe_path, check_paths=False), recipe)
    pairs: list[tuple[str, Any, Any]] = [
        ("the base's weights", before.base.get("weight_hash"), info.base.get("weight_hash")),
        ("the chat template", before.base.get("template_hash"), info.base.get("template_hash")),
    ]
    for part in ("train", "eval"):
        old, new = (found.data.get(part) or {} for found in (before, info))
        pairs.append((f"the rows of data.{part}", old.get("content_hash"), new.get("content_hash")))
    steps = [found.extra.get("plan", {}).get("rows_per_step") for found in (before, info)]
    if steps[0] != steps[1]:
        changes.append(f"rows per optimizer step (batch size x accumulation x processes): {steps[0]} -> {steps[1]}")
    changes += [f"{what} ({_short(old)} -> {_short(new)})" for what, old, new in pairs if old != new]
    if changes:
        raise TrainError(
            "a resumed run goes on as it began, and this has changed: " + "; ".join(changes),
            where=str(folder.path),
            fix="set it back, or begin anew with --overwrite or another output_dir",
        )


def recipe_changes(before: Recipe, after: Recipe) -> list[str]:
    """The settings that differ and matter, as "key: old -> new"."""
    old, new = _flat(before.resolved()), _flat(after.resolved())
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE and key.split(".")[0] not in FREE_TO_CHANGE
    ]


def find_checkpoint(folder: RunFolder, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; says which one, or that there is none."""
    path = newest_checkpoint(folder.checkpoints, say)
    say(f"resuming from {path.name}" if path else "there is no whole checkpoint: training begins at the first step")
    return path


def open_checkpoint(path: Path, optimizer_layout: str) -> Checkpoint:
    """The checkpoint at ``path``, checked against the adapter that is attached.

    Raises:
        TrainError: it is damaged, or belongs to another set of adapter tensors.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.optimizer_layout != optimizer_layout:
        raise TrainError(
            "the checkpoint's optimizer state belongs to other adapter tensors",
            where=str(path),
            fix="resume with the adapter settings of the run",
        )
    return checkpoint


def _short(value: Any) -> str:
    return str(value)[:12] if value is not None else "none"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat
