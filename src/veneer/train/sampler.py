"""Which rows an optimizer step trains on: a pure function of the seed and of how many rows were consumed before.

A step has so many rows, or as many as a budget of tokens holds: then its time hardly varies.

There is no state to save or to replay: the position in the data is one integer, whatever the number of processes and
the layout in memory, so a resumed run continues with exactly the rows that the stopped one would have taken.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows in one epoch.

    Rows are sorted by one random 64-bit key each. The keys come from the raw Philox stream (Salmon et al. 2011), which
    NumPy promises to keep; its ``permutation`` may change between versions, and with it every run.

    Args:
        rows: the number of rows in the training set.
        seed: of the run.
        epoch: 0-based.

    Returns:
        ``[rows]`` int64, a permutation of ``0 .. rows-1``, read-only.
    """
    keys = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(rows)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """The optimizer steps in one epoch; the last one may be smaller, and is kept."""
    return math.ceil(rows / rows_per_step)


def token_steps_per_epoch(lengths: NDArray[np.int64], tokens_per_step: int, seed: int, epoch: int) -> int:
    """The optimizer steps in an epoch whose steps have a budget of tokens; epochs differ, as their orders do."""
    ends = np.cumsum(lengths[epoch_order(len(lengths), seed, epoch)], dtype=np.int64)
    steps = begin = 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        begin = max(begin + 1, int(np.searchsorted(ends, before + tokens_per_step, side="right")))
        steps += 1
    return steps


def step_rows(
    position: int,
    rows: int,
    rows_per_step: int,
    seed: int,
    tokens_per_step: int | None = None,
    lengths: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], int]:
    """The rows of the optimizer step that starts after ``position`` consumed rows.

    A step never crosses an epoch's end: the last step of an epoch takes what is left.

    Args:
        tokens_per_step: the rows take no more tokens than this, but for a single row that does by itself.
        lengths: ``[rows]`` tokens of each, for that.

    Returns:
        ``([n] int64 row indices with 1 <= n <= rows_per_step, the 0-based epoch they belong to)``.
    """
    epoch, offset = divmod(position, rows)
    found = epoch_order(rows, seed, epoch)[offset : offset + rows_per_step]
    if tokens_per_step is not None and lengths is not None:
        ends = np.cumsum(lengths[found], dtype=np.int64)
        found = found[: max(1, int(np.searchsorted(ends, tokens_per_step, side="right")))]
    return found, epoch
