"""The figures of a classifier: confusion matrix, precision, recall and F1 of each class, macro F1 with intervals.

Names: ``N`` rows, ``C`` classes, ``R`` resamples. Macro F1 is the plain mean over the classes that occur among the rows
or the predictions (as scikit-learn takes it), so that a rare class counts as much as a frequent one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.evaluate.bootstrap import CONFIDENCE, RESAMPLES, Estimate, PairedEstimate
from veneer.evaluate.evaluation import Evaluation

ACCURACY, MACRO_F1 = "accuracy", "macro_f1"
CONFIDENCE_SCORE = "confidence"  # in a row's scores: the probability of the class that was predicted

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
_CHUNK = 4_000_000  # numbers of one block of resamples: 32 MB


@dataclass(frozen=True)
class ClassScore:
    """One class; a figure is None where nothing could be divided by (no row of it, or none predicted)."""

    name: str
    rows: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


def confusion(actual: Sequence[int], predicted: Sequence[int], classes: int) -> Counts:
    """``[C, C]``: how many rows of each class (down) were taken for each class (across)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (np.asarray(actual, np.int64), np.asarray(predicted, np.int64)), 1)
    return matrix


def class_scores(matrix: Counts, names: Sequence[str]) -> list[ClassScore]:
    """Precision, recall and F1 of each class of a confusion matrix ``[C, C]``."""
    hits, rows, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return [
        ClassScore(
            name,
            int(rows[i]),
            int(predicted[i]),
            float(hits[i] / predicted[i]) if predicted[i] else None,
            float(hits[i] / rows[i]) if rows[i] else None,
            float(2 * hits[i] / (rows[i] + predicted[i])) if rows[i] + predicted[i] else None,
        )
        for i, name in enumerate(names)
    ]


def macro_f1(matrix: Counts) -> float:
    """The mean F1 of the classes that occur in a confusion matrix ``[C, C]`` that is not empty."""
    found = [score.f1 for score in class_scores(matrix, [""] * len(matrix)) if score.f1 is not None]
    return float(np.mean(found))


def bootstrap_f1(
    actual: Sequence[int],
    predicted: Sequence[int],
    base_predicted: Sequence[int],
    classes: int,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[PairedEstimate, list[PairedEstimate | None]]:
    """Macro F1 and each class's F1 beside a baseline's, with percentile intervals from resampled rows.

    Resamples in which a class does not occur say nothing of it and are left out of its interval.

    Args:
        actual, predicted, base_predicted: ``[N]`` class ids of the same rows, N at least 1.

    Returns:
        Macro F1, and one estimate per class: None where the class occurs nowhere.
    """
    truth = np.eye(classes)[np.asarray(actual, np.int64)]  # [N, C]
    said = [np.eye(classes)[np.asarray(ids, np.int64)] for ids in (predicted, base_predicted)]
    columns = np.concatenate([truth, *said, *(truth * ids for ids in said)], axis=1)  # [N, 5 C]
    count = len(truth)
    drawn = np.empty((2, resamples, classes))
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // max(count, columns.shape[1]))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        index = generator.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(index.ravel(), minlength=size * count).reshape(size, count)  # how often each row is drawn
        drawn[:, start : start + size] = _f1(times @ columns, classes)
    measured = _f1(columns.sum(0)[None], classes)[:, 0]  # [2, C]

    def estimate(value: Any, sample: Any) -> PairedEstimate:
        """Of ``value`` ``[2]`` and ``sample`` ``[2, R]``: the model's, the baseline's, their difference."""
        parts = [(value[0], sample[0]), (value[1], sample[1]), (value[0] - value[1], sample[0] - sample[1])]
        model, base, difference = (_interval(float(v), s, confidence) for v, s in parts)
        return PairedEstimate(model, base, difference)

    per_class: list[PairedEstimate | None] = []
    for index_of_class in range(classes):
        value = measured[:, index_of_class]
        known = not np.isnan(value).all()
        # A class that one of the two never names and no row has: its F1 there is no number, and 0 says that.
        sample = np.where(
            np.isnan(drawn[:, :, index_of_class]).all(0), np.nan, np.nan_to_num(drawn[:, :, index_of_class])
        )
        per_class.append(estimate(np.nan_to_num(value), sample) if known else None)
    return estimate(np.nanmean(measured, -1), np.nanmean(drawn, -1)), per_class


def confusion_of(evaluation: Evaluation) -> tuple[list[str], Counts]:
    """``(names [C], matrix [C, C])`` of an evaluation of a classifier: rows are references, columns predictions."""
    rows = [(row.reference, row.prediction or "") for row in evaluation.rows]
    known = [name.removeprefix(f"{MACRO_F1}.") for name in evaluation.metrics if name.startswith(f"{MACRO_F1}.")]
    place = {name: index for index, name in enumerate(known)}  # every class that occurs has an F1, in the labels' order
    return known, confusion([place[a] for a, _ in rows], [place[b] for _, b in rows], len(known))


def is_classification(evaluation: Evaluation) -> bool:
    """Whether an evaluation is of a classifier, with the majority class in the base's place."""
    return MACRO_F1 in evaluation.metrics


def _f1(sums: Floats, classes: int) -> Floats:
    """``[2, R, C]`` from sums ``[R, 5 C]`` of rows, predictions (two models) and hits (two models); NaN for 0 / 0."""
    rows, said, base_said, hits, base_hits = (sums[:, i * classes : (i + 1) * classes] for i in range(5))
    with np.errstate(invalid="ignore"):
        both: Floats = np.stack([2 * hits / (rows + said), 2 * base_hits / (rows + base_said)])
    return both


def _interval(value: float, sample: Floats, confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(sample, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
