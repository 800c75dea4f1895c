"""A smaller adapter: each layer's update cut down to its largest singular values, and what that costs.

The cut is the best one of its rank (Eckart & Young 1936). The written factors have the same size on either side, and
each layer keeps its scaling, so that training can go on. What is no low-rank update passes through unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer import __version__
from veneer.adapters import AdaptedModel, LoraConfig, load_adapter, read_adapter, read_record
from veneer.adapters.adalora import as_plain, is_adalora
from veneer.adapters.new_tokens import TOKENIZER_FILES
from veneer.adapters.ranks import with_ranks
from veneer.adapters.save import CONFIG, RECORD, TRAINING, WEIGHTS
from veneer.adapters.spectrum import (
    Update,
    directions_for,
    distance,
    factors,
    singular_values,
    spectrum,
    strength_of,
    updates,
)
from veneer.adapters.targets import LoraTarget, Plan
from veneer.data import Rows
from veneer.data.labelled import FORMAT as LABELLED
from veneer.data.read import Source, read
from veneer.errors import AdapterError, UsageError, VeneerError
from veneer.evaluate import Evaluation, evaluate
from veneer.evaluate.classify import evaluate_classes
from veneer.evaluate.measure import PERPLEXITY, Progress
from veneer.files import atomic_folder, write_json
from veneer.recipe.schema import CLASS_METRICS
from veneer.run import (
    classifier_notes,
    held_out_rows,
    is_classifier,
    is_run,
    load_classifier,
    load_model,
    open_run,
)
from veneer.ship.inspect import adapter_folder, in_order

_REPLACEABLE = {CONFIG, WEIGHTS, RECORD, TRAINING, "README.md", "inspect.png", *TOKENIZER_FILES}


@dataclass(frozen=True)
class ResizedLayer:
    """One layer's update before and after."""

    path: str
    rank_before: int
    rank: int
    norm: float  # Frobenius, before
    error: float  # ||dW - dW'|| / ||dW||, Frobenius, of what was written; 0 where there is no update


@dataclass(frozen=True)
class ResizedAdapter:
    """An adapter of smaller rank on disk.

    Attributes:
        folder: what was written.
        layers: by path, numbers by their size; of a stack of experts each one.
        parameters_before, parameters: numbers in the file.
        before, after: the held-out metrics of both adapters, where they were measured.
        notes: what is to be known beside the numbers.
    """

    folder: Path
    layers: list[ResizedLayer]
    parameters_before: int
    parameters: int
    before: Evaluation | None = None
    after: Evaluation | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Of all updates together: the root of the squared errors over the squared norms."""
        total = sum(layer.norm**2 for layer in self.layers)
        return math.sqrt(sum((layer.error * layer.norm) ** 2 for layer in self.layers) / total) if total else 0.0

    def metrics(self) -> dict[str, dict[str, float]]:
        """Each measured metric's value ``before`` and ``after``; empty where none was measured."""
        if self.before is None or self.after is None:
            return {}
        after = self.after.metrics
        return {name: {"before": m.value, "after": after[name].value} for name, m in self.before.metrics.items()}

    def record(self) -> dict[str, Any]:
        """What ``veneer.json`` says of the resize, JSON-able."""
        measured = {} if self.before is None else {"rows": len(self.before.rows), "data": self.before.data_source}
        return {
            "error": self.error,
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
            "layers": {layer.path: dataclasses.asdict(layer) for layer in self.layers},
            "metrics": self.metrics(),
            "measured_on": measured,
            "notes": self.notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"folder": str(self.folder), **self.record()}


def resize_adapter(
    spec: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    data: Rows | Source | None = None,
    metrics: Sequence[str] | None = None,
    measure: bool = True,
    max_rows: int | None = None,
    batch_size: int = 64,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ResizedAdapter:
    """Writes an adapter with fewer ranks that is as near to the given one as any of its ranks can be.

    Args:
        spec: a run folder or an adapter folder.
        output: the folder to write.
        rank: of every layer; one that has no more than that keeps what it has.
        energy: instead of a rank: each layer keeps as many directions as hold this share of its squared singular
            values, so that its error is at most ``sqrt(1 - energy)``; a stack of experts, which has one rank in the
            file, as many as the most demanding of them.
        data: held-out rows to measure both adapters on, read as the run's recipe says; of a run, by default its own.
        metrics: what is measured, by the names that ``veneer.evaluate`` knows; by default the perplexity. A classifier
            has accuracy and F1.
        measure: False leaves the measurement out, and the base is not loaded.
        max_rows: measure on a sample of so many rows.
        batch_size: prompts answered at once.
        dtype, device, base, allow_base_mismatch: of the base, for the measurement.
        overwrite: replace ``output``, if that is an adapter folder.
        progress: of the measurement, as ``veneer.evaluate`` calls it.

    Raises:
        UsageError: neither or both of rank and energy; a rank above what there is; ``output`` is taken; a metric of
            texts for a classifier.
        AdapterError: it is no adapter, its tensors hold NaN, it belongs to another base, or nothing can be resized.
        DataError, ModelError: the rows or the base cannot be read.
        StorageError: the folder cannot be written.
    """
    _check_request(rank, energy)
    target, folder = Path(output).expanduser().absolute(), adapter_folder(spec)
    _check_output(target, overwrite)
    config, tensors = read_adapter(folder)
    found = updates(config, tensors, where=str(folder / WEIGHTS))
    if not found:
        fix = "there are no factors to cut: it holds whole modules or token rows alone"
        raise AdapterError("this adapter has no low-rank update", where=str(folder), fix=fix)
    most = max(update.r for update in found)
    if rank is not None and rank > most:
        fix = f"--rank {most} or less; a larger rank has to be trained"
        raise UsageError(f"rank {rank} is above the adapter's own {most}: there is nothing to fill it with", fix=fix)
    rows, notes = _rows(spec, data) if measure else (None, [])
    where: dict[str, Any] = {"dtype": dtype, "device": device, "base": base, "allow_base_mismatch": allow_base_mismatch}
    measured = _measurement(spec, metrics, max_rows=max_rows, batch_size=batch_size, progress=progress)
    adapted, before, after = None, None, None
    if rows is not None:
        loaded = load_classifier(spec, **where) if is_classifier(spec) else load_model(spec, **where)
        assert isinstance(loaded, AdaptedModel)
        adapted, before = loaded, measured(loaded, rows)
    ranks = _ranks(found, rank, energy)
    changed, _ = with_ranks(config, _plan(config, found), ranks)
    cut, written = _cut(found, ranks, changed)
    written = {key: written.get(key, tensor) for key, tensor in tensors.items()}
    if any(update.magnitude is not None for update in found):
        notes.append("DoRA: the magnitudes are kept, and the direction is that of the base with the cut update")
    with atomic_folder(target) as temporary:
        write_json(temporary / CONFIG, _file_config(folder, changed))
        save_file(written, temporary / WEIGHTS, metadata={"format": "pt"})
        # safetensors creates its file for the owner alone, whatever the umask says.
        os.chmod(temporary / WEIGHTS, (temporary / CONFIG).stat().st_mode & 0o777)
        for name in sorted(TOKENIZER_FILES & set(os.listdir(folder))):  # of a base that tokens were added to
            shutil.copyfile(folder / name, temporary / name)
        record = read_record(folder)
        write_json(temporary / RECORD, record)
        _check_written(temporary, cut)
        if adapted is not None and rows is not None:
            load_adapter(adapted, temporary, name="resized", allow_base_mismatch=allow_base_mismatch)
            after = measured(adapted, rows)
        layers = sorted((_compared(*pair) for pair in zip(found, cut)), key=lambda layer: in_order(layer.path))
        result = ResizedAdapter(target, layers, _count(tensors), _count(written), before, after, notes)
        asked = {"rank": rank, "energy": energy, "adapter": str(folder.absolute())}
        write_json(
            temporary / RECORD, {**record, "resized": {**asked, **result.record()}, "veneer_version": __version__}
        )
    return result


def _check_request(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise UsageError("give either a rank or a share of energy", fix="--rank 8, or --energy 0.99")
    if rank is not None and rank < 1:
        raise UsageError(f"the rank cannot be {rank}", where="rank", fix="give a whole number of at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise UsageError(f"the energy cannot be {energy}", where="energy", fix="give a share above 0, at most 1: 0.99")


def _check_output(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UsageError("the output is taken", where=str(target), fix="choose another folder, or --overwrite")
    strangers = sorted(set(os.listdir(target)) - _REPLACEABLE) if target.is_dir() else [target.name]
    if strangers:
        # The folder is replaced as a whole: whatever else lies in it would be lost.
        what = f"the output holds other files than an adapter's ({', '.join(strangers[:3])})"
        raise UsageError(what, where=str(target), fix="choose another folder")


def _rows(spec: str | Path, data: Rows | Source | None) -> tuple[Rows | None, list[str]]:
    """The rows to measure on, or why there are none: an adapter can be cut when a run's own are gone."""
    if isinstance(data, Rows):
        return data, []
    own = open_run(spec).recipe.data if is_run(spec) else None
    if data is not None:
        if own is not None:
            return read(data, format=own.format, columns=own.columns), []
        return read(data, format=LABELLED if is_classifier(spec) else "auto"), []
    if own is None:
        return None, ["not measured: no held-out rows are named (--data FILE)"]
    try:
        rows = held_out_rows(own)
    except VeneerError as error:
        where = f", {error.where}" if error.where else ""
        return None, [f"not measured: the run's held-out rows cannot be used: {error.what}{where}"]
    return rows, [] if rows is not None else ["not measured: the run held no rows out (--data FILE)"]


def _measurement(
    spec: str | Path, metrics: Sequence[str] | None, **options: Any
) -> Callable[[AdaptedModel, Rows], Evaluation]:
    """What measures an adapter of ``spec`` on rows, the same way before and after."""
    recipe = open_run(spec).recipe if is_run(spec) else None
    if is_classifier(spec):
        if wrong := [name for name in metrics or () if name not in CLASS_METRICS]:
            fix = f"leave the metrics out: a classifier has {' and '.join(CLASS_METRICS)}"
            raise UsageError(f"'{wrong[0]}' is no metric of a classifier", where="metrics", fix=fix)
        options |= {"majority": classifier_notes(spec)["majority"]}
        options |= {"max_length": recipe.train.max_length if recipe else None}
        return partial(evaluate_classes, **options)
    options |= {"metrics": metrics or (PERPLEXITY,), "compare": False}
    options |= {"chat_template": recipe.data.chat_template if recipe else None}
    return partial(evaluate, **options)


def _ranks(found: Sequence[Update], rank: int | None, energy: float | None) -> dict[str, int]:
    """The new rank by path; at least 1, since there is no rank 0."""
    if energy is None:
        assert rank is not None
        return {update.path: min(rank, update.r) for update in found}
    ranks: dict[str, int] = {}
    for update in found:  # a stack of experts has one rank in PEFT's file: what the most demanding expert needs
        needed = directions_for(singular_values(update.A, update.B, update.scaling), energy)
        ranks[update.path] = max(1, needed, ranks.get(update.path, 1))
    return ranks


def _plan(config: LoraConfig, found: Sequence[Update]) -> Plan:
    """The layers as the config's patterns decide for them, without a model."""
    targets = {
        update.path: LoraTarget(update.path, "embedding" if update.kind == "embedding" else "linear", *strength)
        for update in found
        for strength in [strength_of(config, update.path)]
    }
    return Plan(tuple(targets.values()), (), (), ())


def _cut(
    found: Sequence[Update], ranks: Mapping[str, int], config: LoraConfig
) -> tuple[list[Update], dict[str, Tensor]]:
    """Each update at its new rank as it will be read back, and the file's tensors of all of them."""
    cut: list[Update] = []
    stacks: dict[tuple[str, str], list[Update]] = {}
    for update in found:
        r, alpha = strength_of(config, update.path)
        scaling = config.scaling(r, alpha)
        whole = spectrum(update.A, update.B, update.scaling)
        A, B = factors(whole, ranks[update.path], scaling)
        if not whole.S.any():
            A = update.A[: len(A)]  # nothing is learnt from zeros on both sides
        new = dataclasses.replace(update, A=A.to(update.A.dtype), B=B.to(update.B.dtype), scaling=scaling)
        cut.append(new)
        stacks.setdefault(update.keys, []).append(new)
    written: dict[str, Tensor] = {}
    for (key_A, key_B), parts in stacks.items():
        written[key_A] = torch.cat([part.A for part in parts]).contiguous()
        # One layer as it is; experts side by side, each rank's together.
        written[key_B] = torch.stack([part.B for part in parts], dim=-1).flatten(1).contiguous()
    return cut, written


def _check_written(folder: Path, cut: Sequence[Update]) -> None:
    """Reads what was written, as everybody will, and holds it to what was meant."""
    again = {update.name: update for update in updates(*read_adapter(folder), where=str(folder / WEIGHTS))}
    for update in cut:
        read_back = again.pop(update.name, None)
        if (
            read_back is None
            or not math.isclose(read_back.scaling, update.scaling, rel_tol=1e-9)
            or not (torch.equal(read_back.A, update.A) and torch.equal(read_back.B, update.B))
        ):
            fix = "nothing was written; please report it with the adapter's adapter_config.json"
            raise AdapterError("the resized adapter would be read as another one", where=update.name, fix=fix)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _compared(old: Update, new: Update) -> ResizedLayer:
    norm = float(singular_values(old.A, old.B, old.scaling).norm())
    return ResizedLayer(old.name, old.r, new.r, norm, distance(old, new) / norm if norm else 0.0)


def _file_config(folder: Path, changed: LoraConfig) -> dict[str, Any]:
    """The file as it was, whoever wrote it, with the new ranks and what keeps the scalings; AdaLoRA's as plain LoRA."""
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if is_adalora(values):
        values, _ = as_plain(values, {}, where=str(folder / CONFIG))
    new = changed.to_dict()
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")
    return values | {name: new[name] for name in names}
