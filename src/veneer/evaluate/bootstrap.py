"""Paired bootstrap: how far a mean, or the difference of two means, may lie from what was measured on these rows.

The rows are drawn again with replacement; base and adapter are scored on the same draw, so what makes a row easy or
hard for both cancels in the difference (Efron and Tibshirani 1993, chapter 13: the percentile interval).

Names: ``N`` rows, ``R`` resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
CONFIDENCE = 0.95
LARGEST_EXPONENT = 700.0  # nats per token: a broken model's perplexity stays a number that JSON can hold
_CHUNK = 4_000_000  # drawn indices at a time: 32 MB


@dataclass(frozen=True)
class Estimate:
    """What was measured, and its percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedEstimate:
    """An adapter's estimate, and where a base was measured on the same rows, the base's and the difference."""

    value: Estimate
    base: Estimate | None
    difference: Estimate | None


def bootstrap_mean(
    values: Any,
    base_values: Any = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedEstimate:
    """The mean score of ``values`` and of its difference to ``base_values``, with intervals.

    Where all rows score alike there is nothing to resample and the interval has no width; with N rows a rate of 0 or 1
    may still be off by about 3/N.

    Args:
        values: ``[N]`` scores of the rows.
        base_values: ``[N]`` the base's scores of the same rows, in the same order, or None.
        resamples: how many times the rows are drawn again.
        confidence: the share of the resampled means inside the interval.
        seed: the same seed draws the same rows.

    Raises:
        ValueError: no rows, another number of rows in the base, or a score that is not finite.
    """
    columns = _columns(values, base_values)
    return _paired(columns, np.ones(columns.shape[1]), _as_it_is, resamples, confidence, seed)


def bootstrap_perplexity(
    nll: Any,
    tokens: Any,
    base_nll: Any = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PairedEstimate:
    """``exp(sum nll / sum tokens)`` over the rows, with intervals from resampled rows: a row's tokens stay together.

    Args:
        nll: ``[N]`` summed negative log-likelihood (nats) of each row's answer.
        tokens: ``[N]`` how many tokens each sum is over.
        base_nll: ``[N]`` the base's sums over the same tokens, or None.

    Raises:
        ValueError: as :func:`bootstrap_mean`, or a row without tokens.
    """
    columns = _columns(nll, base_nll)
    counts = _columns(tokens, None)[0]
    if len(counts) != columns.shape[1] or (counts <= 0).any():
        raise ValueError("each row needs its number of tokens, at least one")
    return _paired(columns, counts, _exp, resamples, confidence, seed)


def _columns(values: Any, base_values: Any) -> Floats:
    """``[1 or 2, N]`` float64: the adapter's values, then the base's."""
    rows = [np.asarray(values, dtype=np.float64)]
    if base_values is not None:
        rows.append(np.asarray(base_values, dtype=np.float64))
    if rows[0].ndim != 1 or rows[0].size == 0:
        raise ValueError("at least one row is needed")
    if any(row.shape != rows[0].shape for row in rows):
        raise ValueError("base and adapter must have the same rows")
    stacked: Floats = np.stack(rows)
    if not np.isfinite(stacked).all():
        raise ValueError("a score is not finite")
    return stacked


def _paired(
    sums: Floats, weights: Floats, link: Callable[[Floats], Floats], resamples: int, confidence: float, seed: int
) -> PairedEstimate:
    """Estimates of ``link(sum of sums / sum of weights)`` per column, and of the difference of the columns.

    Args:
        sums: ``[K, N]``, K = 1 (adapter) or 2 (adapter, base).
        weights: ``[N]`` what the sums are divided by.
    """
    measured = link(sums.sum(1) / weights.sum())  # [K]
    generator = np.random.default_rng(seed)
    rows = len(weights)
    step = max(1, _CHUNK // rows)
    ratios = np.empty((len(sums), resamples))
    for start in range(0, resamples, step):
        index = generator.integers(0, rows, size=(min(step, resamples - start), rows))
        part = slice(start, start + len(index))
        below = weights[index].sum(1)
        for column, above in enumerate(sums):
            ratios[column, part] = above[index].sum(1) / below
    drawn = link(ratios)
    estimates = [_estimate(float(value), sample, confidence) for value, sample in zip(measured, drawn)]
    if len(estimates) == 1:
        return PairedEstimate(estimates[0], None, None)
    difference = _estimate(float(measured[0] - measured[1]), drawn[0] - drawn[1], confidence)
    return PairedEstimate(estimates[0], estimates[1], difference)


def _as_it_is(ratio: Floats) -> Floats:
    return ratio


def _exp(ratio: Floats) -> Floats:
    return np.exp(np.minimum(ratio, LARGEST_EXPONENT))


def _estimate(value: float, sample: Floats, confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(sample, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
