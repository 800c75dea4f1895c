"""What a step keeps from its forward to its backward, and how much of it is computed again instead.

Levels, each keeping less and computing more than the one before:

    none   everything that the operations keep
    mlp    gated MLPs keep their input and the rank-r rows: two of a layer's seven products are computed twice
    full   each decoder layer keeps its input alone: its whole forward is computed twice
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from veneer.data.pack import Batch
from veneer.errors import TrainError
from veneer.kernels.heap import reuse_freed_memory
from veneer.models.fused_mlp import FusedGatedMlp
from veneer.models.quantized_memory import free_bytes
from veneer.train.noise import as_in_training
from veneer.train.sft import Objective

Level = Literal["none", "mlp", "full"]
LEVELS: tuple[Level, ...] = ("none", "mlp", "full")
SPARE = 0.9  # of what is free may be planned with
WORKING = 300_000_000  # what the backward holds beside what was kept: a layer's gradients, the head's chunks


@contextmanager
def gradient_checkpointing(module: nn.Module, level: Level) -> Iterator[None]:
    """While it is open, less is kept for the backward, as the level says.

    ``full`` is non-reentrant, so that it works although the embeddings are frozen: the reentrant kind silently gives no
    gradient when its input needs none. transformers' own switch would make the embeddings' output need one, for good.

    Raises:
        TrainError: the model has nothing of the kind.
    """
    parts = _parts(module, level)
    if level != "none" and not parts:
        what = "no gated MLP that runs as one operation" if level == "mlp" else "no layers that can be computed again"
        raise TrainError(
            f"{type(module).__name__} has {what}", where="train.gradient_checkpointing", fix="set it to auto or false"
        )
    for part in parts:
        if isinstance(part, FusedGatedMlp):
            part.recompute = True
        else:
            part.gradient_checkpointing = True
            part._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for part in parts:
            if isinstance(part, FusedGatedMlp):
                part.recompute = False
            else:
                del part.gradient_checkpointing, part._gradient_checkpointing_func


def _parts(module: nn.Module, level: Level) -> list[Any]:
    kind = {"none": (), "mlp": FusedGatedMlp, "full": GradientCheckpointingLayer}[level]
    return [part for part in module.modules() if isinstance(part, kind)]


def kept_bytes(module: nn.Module, objective: Objective, batch: Batch) -> int:
    """Bytes that a forward of ``batch`` keeps for its backward, without weights. Measured."""
    held = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # an output that is kept with its own node would hold the graph, and that would hold it

    with (
        as_in_training(module, batch.input_ids.device),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        output = objective(module, batch)
        total = sum(found.values())
        del output  # not before: a storage that is freed could be counted for another
    return total


def growth(device: torch.device) -> float:
    """What a micro-batch takes, by what it keeps: more where freed memory does not serve again.

    Measured on SmolLM2-135M on a CPU where it does (LoRA, NF4, dropout, recomputed MLPs): 0.86 at most.
    """
    return 1.1 if device.type == "cpu" and reuse_freed_memory() else 1.35


def choose_level(
    wanted: bool | str, module: nn.Module, objective: Objective, batch: Batch, tokens: int
) -> tuple[Level, str | None]:
    """The level that is wanted, and what there is to say about it.

    Args:
        wanted: the recipe's setting. ``auto`` is the first level at which a micro-batch fits into the memory that is
            free; the last one where none does, and ``none`` where the system does not say what is free.
        batch: a few tokens: what they keep is measured, and grows with their number.
        tokens: of the largest micro-batch.
    """
    if wanted != "auto":
        return "mlp" if wanted == "mlp" else "full" if wanted else "none", None
    device = batch.input_ids.device
    free = free_bytes(device)
    if free is None:
        return "none", None
    needs: dict[Level, int] = {}
    kept: dict[Level, float] = {}
    for level in LEVELS:
        parts = _parts(module, level)
        if level != "none" and not parts:
            continue
        with gradient_checkpointing(module, level):
            kept[level] = kept_bytes(module, objective, batch) / batch.input_ids.numel()
        again = (kept["none"] - kept[level]) / len(parts) if level == "full" else 0.0  # of the layer in the backward
        needs[level] = int(growth(device) * (kept[level] + again) * tokens) + WORKING
        if needs[level] <= SPARE * free:
            break
    level, need = next(reversed(needs.items()))
    if level == "none" and need <= SPARE * free:
        return level, None
    wanted = f"a micro-batch of {tokens} tokens needs about {needs['none'] / 1e9:.1f} GB of activations"
    if need <= SPARE * free:
        what = "gated MLPs are" if level == "mlp" else "every layer is"
        return level, f"{wanted}, and {free / 1e9:.1f} GB are free: {what} computed twice ({need / 1e9:.1f} GB)"
    return level, (
        f"{wanted}, {need / 1e9:.1f} GB with every layer computed twice, and {free / 1e9:.1f} GB are free: it may not "
        "fit; lower train.micro_batch_tokens or train.max_length"
    )
