"""Before the first step: do the operations compute what they should, on this machine, over this base?

Every operation that a forward pass calls is compared with its float32 reference, forward and backward, on a few tokens
of the first rows; see :mod:`veneer.kernels.check`. A compiler, a driver or a processor that is at fault is then named
before it has trained anything.
"""

from __future__ import annotations

import torch
from torch import nn

from veneer.data.dataset import Example, TokenDataset
from veneer.data.label_render import LabelledDataset
from veneer.data.pack import Batch, collate_packed, collate_padded
from veneer.errors import TrainError
from veneer.kernels.check import Finding, Watch, watching
from veneer.train.classification import class_micro_batches
from veneer.train.layout import Layout
from veneer.train.noise import as_in_training
from veneer.train.sft import Objective

TOKENS = 128  # of a row: its last ones, which hold trained tokens if any part does


def self_check(module: nn.Module, objective: Objective, batch: Batch, *, every: bool = False) -> Watch:
    """Compares the operations of a forward pass.

    Args:
        module: on its device, as it will be trained.
        batch: a few tokens; see :func:`few_tokens`.
        every: compare every layer; else the first of each operation and shape.

    Raises:
        TrainError: an operation is off.
    """
    with as_in_training(module, batch.input_ids.device), torch.no_grad(), watching(every) as watch:
        objective(module, batch)
    off = [finding for finding in watch.findings if finding.is_off]
    if off:
        raise _error(off[0], len(off), len(watch.findings))
    return watch


def few_tokens(dataset: TokenDataset, layout: Layout) -> Batch:
    """The ends of the first two rows, laid out as the run's rows are."""
    places = range(min(2, len(dataset)))
    if isinstance(dataset, LabelledDataset):
        return next(class_micro_batches(places, dataset, layout))
    rows = [dataset.row(place) for place in places]
    rows = [Example(row.input_ids[-TOKENS:], row.trained[-TOKENS:], row.row_id) for row in rows]
    return collate_packed(rows) if layout.packing else collate_padded(rows, layout.pad_id)


def _error(worst: Finding, count: int, of: int) -> TrainError:
    native = "set VENEER_KERNELS=torch in the environment, which leaves the native code out; " if worst.native else ""
    return TrainError(
        f"{worst.operation}: the {worst.part} differs by {worst.error:.1%} from its float32 reference, and rounding "
        f"explains {worst.tolerance:.1%}",
        where=f"the check before the first step, on rows of this run; {count} of {of} comparisons are off",
        fix=native + "use dtype: float32, and report this with the processor and the versions in run.json",
    )
