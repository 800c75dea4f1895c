"""Which rows an optimizer step trains on: a pure function of the seed and of how many rows were consumed before.

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


def step_rows(position: int, rows: int, rows_per_step: int, seed: int) -> tuple[NDArray[np.int64], int]:
    """The rows of the optimizer step that starts after ``position`` consumed rows.

    A step never crosses an epoch's end: the last step of an epoch takes what is left.

    Returns:
        ``([n] int64 row indices with 1 <= n <= rows_per_step, the 0-based epoch they belong to)``.
    """
    epoch, offset = divmod(position, rows)
    return epoch_order(rows, seed, epoch)[offset : offset + rows_per_step], epoch
