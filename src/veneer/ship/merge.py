"""Folding an adapter into its base and writing a plain Hugging Face folder, read back and compared before it counts.

An adapter over a base in codes can be folded into two things: the original weights, or what the codes stand for. The
drift of both from the unmerged run is measured, whichever is written.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer import __version__
from veneer.adapters import AdaptedModel, MergeReport, load_adapter, merge
from veneer.adapters.precision import Precision, precision_of
from veneer.errors import UsageError, did_you_mean
from veneer.files import atomic_folder, write_json
from veneer.models import Base, load_base
from veneer.models.processor import copy_processor
from veneer.models.quantized_config import declared_config
from veneer.models.source import find
from veneer.models.strict import quiet
from veneer.run import classifier_notes, is_classifier, is_run, load_classifier, load_model, open_run
from veneer.ship.drift import Probe, drift, logits_of, probe_of
from veneer.ship.plain import make_plain

ORIGINAL, DEQUANTIZED = "original", "dequantized"


@dataclass(frozen=True)
class MergedModel:
    """A merged model on disk, and how far its predictions are from those of base and adapter.

    Attributes:
        folder: what was written.
        report: the drift of what was written.
        base: identity of the base.
        bytes: of the weight files.
        trained_over: how the base was stored that the adapter was trained over.
        onto: which weights the adapter was folded into: "original" or "dequantized".
        drifts: the drift by ``onto``: of both, where the adapter was trained over codes and there is an original.
        measured_on: what the drift was measured on, for people.
        labels: the classes of a classifier, in the order of its logits.
    """

    folder: Path
    report: MergeReport
    base: dict[str, Any]
    bytes: int
    trained_over: Precision
    onto: str
    drifts: Mapping[str, MergeReport]
    measured_on: str
    labels: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """What ``veneer.json`` of the folder says of the merge."""
        return {
            "onto": self.onto,
            "quantization": self.trained_over.to_dict(),
            "drift": asdict(self.report),
            "drifts": {onto: asdict(report) for onto, report in self.drifts.items()},
            "measured_on": self.measured_on,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"folder": str(self.folder), "base": self.base, "bytes": self.bytes, **self.record()}


def merge_model(
    spec: str | Path,
    output: str | Path,
    *,
    onto: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    quantize: str = "auto",
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> MergedModel:
    """Folds the adapter of ``spec`` into its base and writes weights, configuration, tokenizer and chat template.

    The folder is read back before it takes its name, and the model that was read is compared with base and adapter: on
    the answers of the run's own held-out rows, else on built-in texts; a classifier on the classes that it gives them.
    Models are loaded one after the other.

    Args:
        spec: a run folder or an adapter folder.
        output: the folder to write.
        onto: of an adapter over a base in codes: "dequantized", the default, folds it into what the codes stand for.
            That is what the adapter was trained over and evaluated with, and gives that run to rounding. "original"
            folds it into the weights that the codes were made from: it takes the codes' error out of the base, but the
            adapter had learnt to make up for some of it, and nothing has evaluated this model yet.
        dtype: of the merged weights; "auto" is the run's own.
        device: to compute on.
        base: the base, where it is not the one recorded.
        quantize: what the base was stored in while it was trained over, where the adapter does not say: nf4, fp4, int8.
        allow_base_mismatch: merge into a base with other weights than those the adapter was trained on.
        overwrite: replace ``output``.

    Raises:
        UsageError: ``output`` is taken, ``spec`` is a base without an adapter, or ``onto`` asks for weights that there
            are not.
        AdapterError: the adapter does not fit, or a merged weight is not finite.
        StorageError: the folder cannot be written.
    """
    folder = Path(output).expanduser().absolute()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the output is taken", where=str(folder), fix="choose another folder, or --overwrite")
    if onto not in (None, ORIGINAL, DEQUANTIZED):
        fix = did_you_mean(onto, (ORIGINAL, DEQUANTIZED)) or f"use {ORIGINAL} or {DEQUANTIZED}"
        raise UsageError(f"unknown weights to merge onto: '{onto}'", where="onto", fix=fix)
    run = open_run(spec) if is_run(spec) else None
    adapter = run.folder.adapter if run else Path(spec).expanduser()
    where: dict[str, Any] = {"dtype": dtype, "device": device, "base": base, "allow_base_mismatch": allow_base_mismatch}
    notes: dict[str, Any] = {}
    adapted: Base | AdaptedModel
    if is_classifier(spec):
        if quantize not in ("auto", "none"):
            raise UsageError("a classifier's base is never quantised", where="quantize", fix="leave it out")
        adapted, notes = load_classifier(spec, **where), classifier_notes(spec)
    else:
        adapted = load_model(spec, quantize=quantize, **where)
    if not isinstance(adapted, AdaptedModel) or not isinstance(adapted.base, Base):
        raise UsageError(f"'{spec}' is a base: there is no adapter to merge", fix="give a run or an adapter folder")
    loaded = adapted.base
    open_original = partial(
        load_base, loaded.spec, revision=loaded.identity.revision, dtype=loaded.dtype, device=loaded.device
    )
    trained_over, ways = precision_of(loaded), _ways(loaded)
    chosen = _choice(onto, ways, loaded)
    probe = probe_of(loaded, run)
    kept = logits_of(adapted.module, probe)
    template = run.recipe.data.chat_template if run else None
    drifts: dict[str, MergeReport] = {}
    with atomic_folder(folder) as temporary:
        for way in ways:
            if way == ORIGINAL and trained_over.config is not None:
                del adapted, loaded  # the codes go before the original weights come
                gc.collect()  # modules hold each other in circles
                loaded = open_original()
                adapted = load_adapter(
                    loaded, adapter, allow_base_mismatch=allow_base_mismatch, allow_other_precision=True
                )
            drifts[way] = _fold(adapted, loaded, probe, kept, template, temporary if way == chosen else None)
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        identity = loaded.identity.to_dict()
        labels = loaded.labels
        result = MergedModel(
            folder, drifts[chosen], identity, size, trained_over, chosen, drifts, probe.description, labels
        )
        write_json(
            temporary / "veneer.json",
            {
                "base": identity,
                "merged": {"adapter": str(Path(spec).absolute()), **result.record()},
                "veneer_version": __version__,
                **notes,
            },
        )
    return result


def _ways(base: Base) -> tuple[str, ...]:
    """What the adapter can be folded into; what is in memory already comes first."""
    if base.quantization is None:
        return (ORIGINAL,)
    folder = find(base.spec, base.identity.revision, trust_remote_code=False).folder
    if folder is None:  # a GGUF file: what load_base makes of it is the original
        return (DEQUANTIZED, ORIGINAL)
    path = folder / "config.json"
    in_codes = declared_config(json.loads(path.read_text(encoding="utf-8")), path) is not None
    return (DEQUANTIZED,) if in_codes else (DEQUANTIZED, ORIGINAL)


def _choice(onto: str | None, ways: tuple[str, ...], base: Base) -> str:
    """The way that is asked for, or the default.

    Raises:
        UsageError: it is not open to this base.
    """
    if onto is None:
        return ways[0]
    if onto in ways:
        return onto
    if onto == DEQUANTIZED:
        what = "the adapter was trained over weights that are not quantised: there are no codes to dequantise"
        raise UsageError(what, where="onto", fix="leave --onto out")
    raise UsageError(
        f"'{base.spec}' holds its weights in codes: the original ones are not there to merge onto",
        where="onto",
        fix="--onto dequantized; or name the model that it was quantised from: --base ... --allow-base-mismatch",
    )


def _fold(
    adapted: AdaptedModel, base: Base, probe: Probe, kept: list[Tensor], template: str | None, folder: Path | None
) -> MergeReport:
    """Merges and measures; with a folder what was written and read back, else what is in memory."""
    merged: Any = merge(adapted)
    if base.quantization is not None:
        make_plain(merged)
    if folder is None:
        return drift(kept, merged, probe)
    with quiet():
        merged.save_pretrained(str(folder))
    copy_processor(Path(merged.name_or_path), folder)
    del merged
    before = base.tokenizer.chat_template
    try:
        if template is not None:
            base.tokenizer.chat_template = template  # the one it was trained with has to be the one it is asked with
        base.tokenizer.save_pretrained(str(folder))
    finally:
        base.tokenizer.chat_template = before
    written = load_base(folder, dtype=base.dtype, device=base.device, labels=base.labels or None)
    return drift(kept, written.module, probe)
