"""A classifier's predictions, and their evaluation against always saying the most frequent class."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from veneer.adapters import AdaptedModel
from veneer.data.conversation import Rows
from veneer.data.label_batch import labelled_batches
from veneer.data.label_render import EMPTY, LabelledDataset, render_labelled
from veneer.data.labelled import LabelledRow
from veneer.data.render import named
from veneer.errors import DataError, UsageError
from veneer.evaluate.bootstrap import CONFIDENCE, RESAMPLES, PairedEstimate, bootstrap_mean
from veneer.evaluate.class_scores import ACCURACY, CONFIDENCE_SCORE, MACRO_F1, Floats, bootstrap_f1
from veneer.evaluate.evaluation import Evaluation, MetricResult, RowResult
from veneer.models import Base
from veneer.models.classifier import class_logits, longest_row, pad_id_of_classifier

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one row; ``probabilities`` are of all classes, in the order of its labels."""

    row_id: str
    text: str
    label: str
    probability: float
    probabilities: dict[str, float]
    reference: str | None = None


def predict(
    model: Base | AdaptedModel,
    rows: Rows | Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Prediction]:
    """The class of each row, with probabilities, under the model as it stands.

    Args:
        rows: labelled rows (a label is only handed on), or texts.
        max_length: the most tokens of a row, as in training; never more than the model has positions for.
        progress: called as ``progress("predictions", done, total)``.
        warn: gets sentences about rows that had to be cut.

    Raises:
        UsageError: the model is no classifier.
        DataError: rows without text, or with a label that the model does not know.
    """
    base = classifier_of(model)
    if not isinstance(rows, Rows):
        texts = [LabelledRow((), f"text {n}", text=text, kind="text") for n, text in enumerate(rows, 1)]
        rows = Rows([*texts], "labelled", "texts", "texts")
    dataset = rendered(rows, base, max_length)
    if empty := dataset.stats.dropped.get(EMPTY):
        raise DataError(f"{len(empty):,} rows have no text", where=named(empty), fix="take them out")
    for text in dataset.stats.warnings:
        if warn is not None:
            warn(text)
    found = probabilities(base, dataset, batch_size, progress)
    predictions = []
    for row, chances, known in zip(rows.conversations, found.tolist(), dataset.classes.tolist()):
        best = int(np.argmax(chances))
        reference = base.labels[known] if known >= 0 else None
        by_name = dict(zip(base.labels, chances))
        predictions.append(
            Prediction(row.row_id, shown_text(row), base.labels[best], chances[best], by_name, reference)
        )
    return predictions


def evaluate_classes(
    model: Base | AdaptedModel,
    rows: Rows,
    *,
    majority: str | None = None,
    max_length: int | None = None,
    max_rows: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """Accuracy and macro F1 on held-out rows, with F1 of each class; the baseline always says ``majority``.

    In the result that baseline stands where a base model stands in other evaluations, and each row's scores hold the
    accuracy and the confidence of the prediction.

    Args:
        rows: labelled rows.
        majority: the most frequent class of the training rows; None takes that of ``rows`` themselves.
        max_rows: measure a sample of so many rows, drawn with ``seed``.
        seed: of the sample and of the bootstrap.
        max_length, batch_size, progress, warn: as for :func:`predict`.

    Raises:
        UsageError: the model is no classifier, or does not know ``majority``.
        DataError: rows without text or label, or with an unknown label.
    """
    started = time.perf_counter()
    base = classifier_of(model)
    if max_rows is not None and max_rows < len(rows):
        picked = sorted(random.Random(seed).sample(range(len(rows)), max_rows))
        rows = rows.subset(picked, f"{rows.description}; a sample of {max_rows:,} rows")
    found = predict(model, rows, max_length=max_length, batch_size=batch_size, progress=progress, warn=warn)
    if missing := [prediction.row_id for prediction in found if prediction.reference is None]:
        raise DataError(
            f"{len(missing):,} of {len(found):,} rows have no label to compare with",
            where=named(missing),
            fix="label them; columns: {label: NAME} in the recipe says which column holds the labels",
        )
    references = [prediction.reference or "" for prediction in found]
    majority = majority or max(base.labels, key=references.count)
    if majority not in base.labels:
        raise UsageError(f"the model has no class '{majority}'", where="majority", fix="name one of its classes")
    results = [
        RowResult(
            row_id=prediction.row_id,
            prompt=prediction.text,
            reference=reference,
            prediction=prediction.label,
            base_prediction=majority,
            scores={ACCURACY: float(prediction.label == reference), CONFIDENCE_SCORE: prediction.probability},
            base_scores={ACCURACY: float(majority == reference)},
        )
        for prediction, reference in zip(found, references)
    ]
    return Evaluation(
        metrics=_metrics(results, base.labels, seed, resamples),
        rows=results,
        model=base.spec,
        base=base.identity.to_dict(),
        data_source=rows.source,
        data_hash=rows.content_hash,
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def classifier_of(model: Base | AdaptedModel) -> Base:
    """The base of a classifier.

    Raises:
        UsageError: the model writes text instead, or has no tokenizer.
    """
    base = model.base if isinstance(model, AdaptedModel) else model
    if not isinstance(base, Base) or not base.labels:
        raise UsageError(
            "this model is no classifier: it has no classes",
            fix="load it with veneer.load_base(..., labels=[...]), or give a run of task: classification",
        )
    return base


def rendered(rows: Rows, base: Base, max_length: int | None, overlong: str = "truncate") -> LabelledDataset:
    """Labelled rows as the classifier is given them, no longer than it has positions for.

    Raises:
        DataError: as :func:`veneer.data.label_render.render_labelled`.
    """
    limits = [limit for limit in (max_length, longest_row(base.module)) if limit is not None]
    return render_labelled(
        rows,
        base.tokenizer,
        base.labels,
        max_length=min(limits, default=None),
        overlong=overlong,  # type: ignore[arg-type]  # the recipe and render_labelled check it
        pad_id=pad_id_of_classifier(base.module),
    )


@torch.no_grad()
def probabilities(base: Base, dataset: LabelledDataset, batch_size: int, progress: Progress | None = None) -> Floats:
    """``[rows, C]`` the probability of each class, in eval mode; the module goes on in the mode it was in."""
    found = np.zeros((len(dataset), len(base.labels)))
    training = base.module.training
    base.module.eval()
    try:
        done = 0
        order = sorted(range(len(dataset)), key=lambda index: (-int(dataset.lengths[index]), index))
        for batch in labelled_batches(dataset, order, batch_size, pad_id_of_classifier(base.module)):
            chances = class_logits(base.module, batch).double().softmax(-1).cpu().numpy()
            found[order[done : done + len(chances)]] = chances
            done += len(chances)
            if progress is not None:
                progress("predictions", done, len(dataset))
    finally:
        base.module.train(training)
    return found


def shown_text(row: object) -> str:
    """A row's text as a reader sees it, the second one of a pair on a line of its own."""
    assert isinstance(row, LabelledRow)
    return row.text or "" if row.pair is None else f"{row.text}\n{row.pair}"


def _metrics(rows: Sequence[RowResult], labels: Sequence[str], seed: int, resamples: int) -> dict[str, MetricResult]:
    def result(found: PairedEstimate) -> MetricResult:
        value, base, difference = found.value, found.base, found.difference
        assert base is not None
        assert difference is not None
        return MetricResult(
            value=value.value,
            low=value.low,
            high=value.high,
            base_value=base.value,
            difference=difference.value,
            difference_low=difference.low,
            difference_high=difference.high,
            base_low=base.low,
            base_high=base.high,
            rows=len(rows),
        )

    place = {name: index for index, name in enumerate(labels)}
    right = [row.scores[ACCURACY] for row in rows]
    base_right = [(row.base_scores or {})[ACCURACY] for row in rows]
    macro, each = bootstrap_f1(
        [place[row.reference] for row in rows],
        [place[row.prediction or ""] for row in rows],
        [place[row.base_prediction or ""] for row in rows],
        len(labels),
        resamples=resamples,
        seed=seed,
    )
    return {
        ACCURACY: result(bootstrap_mean(right, base_right, resamples=resamples, seed=seed)),
        MACRO_F1: result(macro),
        **{f"{MACRO_F1}.{name}": result(found) for name, found in zip(labels, each) if found is not None},
    }
