"""Before the first step: do the operations compute what they should, on this machine, over this base?

Every operation that a forward pass calls is compared with its float32 reference, forward and backward, on a few tokens
of the first rows; see :mod:`veneer.kernels.check`. A compiler, a driver or a processor that is at fault is then named
before it has trained anything.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from veneer.adapters import AdaptedModel
from veneer.adapters.model import KEY_PREFIX
from veneer.data.dataset import Example, TokenDataset
from veneer.data.label_render import LabelledDataset
from veneer.data.pack import Batch, collate_packed, collate_padded
from veneer.errors import TrainError
from veneer.kernels.check import Finding, Watch, watching
from veneer.models.strict import first_line, shortlist
from veneer.train.activations import counting_kept
from veneer.train.classification import class_micro_batches
from veneer.train.layout import Layout
from veneer.train.noise import as_in_training
from veneer.train.sft import Objective

_MAY_REST = re.compile(r"trainable_tokens|(^|\.)experts(\.|$)")
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


def check_gradients(adapted: AdaptedModel, objective: Objective, batch: Batch) -> int:
    """A step on trial: it can be computed, and every adapter tensor takes part in it. Nothing is kept of it.

    Rows of tokens and routed experts are left aside: a few tokens need not reach them.

    Returns:
        the bytes that the forward kept for the backward.

    Raises:
        TrainError: the step fails, or a tensor takes no part in the loss: its layer is not called, or not read.
    """
    module, named = adapted.module, adapted.named_parameters()
    try:
        with as_in_training(module, batch.input_ids.device), torch.enable_grad():
            with counting_kept(module, ()) as kept:
                loss = objective(module, batch).loss_sum
            grads = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrainError(
            f"{type(module).__name__} cannot be trained: a step on trial fails with {type(error).__name__}: "
            f"{first_line(error)}",
            where="the check before the first step, on rows of this run",
            fix="leave the layer that fails out with adapter.exclude_modules, or report this with the model's name",
        ) from error
    apart = [name for (name, _), grad in zip(named, grads) if grad is None and not _MAY_REST.search(name)]
    if apart:
        reached = {_name(_path(name)) for name, _ in named if name not in apart}
        paths = map(_path, apart)
        layers = list(dict.fromkeys(path if _name(path) in reached else _name(path) for path in paths))
        raise TrainError(
            f"{len(apart)} of {len(named)} adapter tensors take no part in the loss",
            where=shortlist(apart),
            fix="rows like these do not reach their layers, as rows of text do not reach one that reads images: leave "
            f"them out with adapter.layers_to_transform or adapter.exclude_modules: [{', '.join(layers)}]",
        )
    return sum(kept.values())


def _path(tensor: str) -> str:
    """The path of an adapter tensor's layer."""
    return re.sub(r"\.(lora_\w+(\.weight)?|weight|bias)$", "", tensor.removeprefix(KEY_PREFIX))


def _name(path: str) -> str:
    """What a layer and its like in other blocks are called."""
    return re.split(r"\.\d+\.", path)[-1]


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
