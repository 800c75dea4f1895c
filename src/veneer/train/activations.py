"""What a step keeps from its forward to its backward, and how much of it is computed again instead.

Blocks of two kinds can be computed twice:

    gated MLPs   keep their input and the rank-r rows: two of a layer's seven products are computed twice
    layers       keep their input alone: the whole forward is computed twice

As many are as it takes for a micro-batch to fit into the memory that is free: MLPs first, which save most for what they
cost, and then layers; the first ones of the model, which come last in the backward, when the others' memory is free.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
_SWITCHES = ("recompute", "gradient_checkpointing", "_gradient_checkpointing_func")  # attributes of the blocks


@contextmanager
def gradient_checkpointing(module: nn.Module, which: Level | Sequence[nn.Module]) -> Iterator[None]:
    """While it is open, less is kept for the backward.

    Layers are non-reentrant, so that it works although the embeddings are frozen: the reentrant kind silently gives no
    gradient when its input needs none. transformers' own switch would make the embeddings' output need one, for good.

    Args:
        which: the blocks that are computed twice, or all of a kind: ``mlp`` or ``full``.

    Raises:
        TrainError: the model has nothing of the kind.
    """
    parts: list[Any] = _some_blocks(module, which) if isinstance(which, str) else list(which)
    own = [{key: part.__dict__[key] for key in _SWITCHES if key in part.__dict__} for part in parts]
    for part in parts:
        if isinstance(part, FusedGatedMlp):
            part.recompute = True
        else:
            part.gradient_checkpointing = True
            part._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for part, before in zip(parts, own, strict=True):
            for key in _SWITCHES:
                part.__dict__.pop(key, None)
            part.__dict__.update(before)  # a user's own checkpointing among it


def _some_blocks(module: nn.Module, level: Level) -> list[nn.Module]:
    """All blocks of a kind, of which there must be one."""
    blocks = all_blocks(module, level)
    if level != "none" and not blocks:
        what = "no gated MLP that runs as one operation" if level == "mlp" else "no layers that can be computed again"
        raise TrainError(
            f"{type(module).__name__} has {what}", where="train.gradient_checkpointing", fix="set it to auto or false"
        )
    return blocks


def all_blocks(module: nn.Module, level: Level) -> list[nn.Module]:
    """All blocks of a kind."""
    kind = {"none": (), "mlp": FusedGatedMlp, "full": GradientCheckpointingLayer}[level]
    return [part for part in module.modules() if isinstance(part, kind)]


def said_of(module: nn.Module, blocks: Sequence[nn.Module]) -> str:
    """What is computed twice, in words."""
    if not blocks:
        return "kept from the forward to the backward"
    parts = []
    for level, name in (("full", "layers"), ("mlp", "gated MLPs")):
        every = all_blocks(module, level)  # type: ignore[arg-type]  # both are levels
        count = sum(any(block is own for own in every) for block in blocks)
        parts += [f"{count} of {len(every)} {name}"] if count else []
    return f"those of {' and '.join(parts)} computed twice"


def kept_bytes(module: nn.Module, objective: Objective, batch: Batch) -> int:
    """Bytes that a forward of ``batch`` keeps for its backward, without weights. Measured."""
    return sum(_kept_by_block(module, objective, batch, all_blocks(module, "full")).values())


def _kept_by_block(
    module: nn.Module, objective: Objective, batch: Batch, blocks: Sequence[nn.Module]
) -> dict[nn.Module | None, int]:
    with as_in_training(module, batch.input_ids.device), torch.enable_grad(), counting_kept(module, blocks) as kept:
        output = objective(module, batch)
    del output
    return kept


@contextmanager
def counting_kept(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module | None, int]]:
    """Counts the bytes that a forward within keeps for its backward, without weights.

    Gives what each of the blocks, in the order in which they run, keeps by itself; None stands for the rest. It is
    filled in at the end. Until then the output has to be held: a storage that is freed could be counted for another.
    """
    held = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, tuple[nn.Module | None, int]] = {}
    running: list[nn.Module | None] = [None]
    order: dict[nn.Module | None, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = found.get(storage.data_ptr(), (running[-1],))[0], storage.nbytes()
        return t.detach()  # an output that is kept with its own node would hold the graph, and that would hold it

    def enter(block: Any, inputs: tuple[Any, ...]) -> None:
        running.append(block)
        order[block] = 0
        if getattr(block, "gradient_checkpointing", False) and inputs and isinstance(inputs[0], Tensor):
            note(inputs[0])  # a layer that is computed twice keeps it, and autograd is not told

    def leave(*_: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(enter))
            stack.enter_context(block.register_forward_hook(leave))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda t: t))
        yield order
    for owner, size in found.values():
        order[owner] = order.get(owner, 0) + size


def growth(device: torch.device) -> float:
    """What a micro-batch takes, by what it keeps: more where freed memory does not serve again.

    Measured on SmolLM2-135M on a CPU where it does (LoRA, NF4, dropout, recomputed MLPs): 0.86 at most.
    """
    return 1.1 if device.type == "cpu" and reuse_freed_memory() else 1.35


@dataclass(frozen=True)
class _Kept:
    """What blocks keep of a few tokens, in bytes by block and in all: as they are, MLPs twice, and layers twice."""

    plain: dict[nn.Module | None, int]
    mlp: dict[nn.Module | None, int]
    full: dict[nn.Module | None, int]

    def saved(self, mlp: nn.Module) -> int:
        """By an MLP."""
        return self.plain.get(mlp, 0) - self.mlp.get(mlp, 0)

    def of_layer(self, layer: nn.Module, kept: dict[nn.Module | None, int]) -> int:
        """What a layer keeps with all that is in it."""
        return sum(kept.get(part, 0) for part in layer.modules())


def choose_blocks(
    wanted: bool | str,
    module: nn.Module,
    objective: Objective,
    batch: Batch,
    tokens: int,
    kept: int | None = None,
) -> tuple[list[nn.Module], str | None]:
    """The blocks that are computed twice, and what there is to say about it.

    Args:
        wanted: the recipe's setting. ``auto`` takes the fewest with which a micro-batch fits into the memory that is
            free; all layers where it does not fit even so, and none where the system does not say what is free.
        batch: a few tokens: what they keep is measured, and grows with their number.
        tokens: of the largest micro-batch.
        kept: bytes that a forward of ``batch`` keeps, where they were counted already.

    Raises:
        TrainError: the recipe asks for a kind of which the model has none.
    """
    if wanted != "auto":
        return _some_blocks(module, "mlp" if wanted == "mlp" else "full" if wanted else "none"), None
    device = batch.input_ids.device
    free = free_bytes(device)
    if free is None:
        return [], None

    def need(kept: float) -> int:
        return int(growth(device) * kept / batch.input_ids.numel() * tokens) + WORKING

    plain = need(kept_bytes(module, objective, batch) if kept is None else kept)
    if plain <= SPARE * free:
        return [], None
    blocks, needed = _fewest(module, objective, batch, lambda kept: need(kept) <= SPARE * free)
    needed = need(needed)
    what = said_of(module, blocks)
    short = f"a micro-batch of {tokens} tokens needs about {plain / 1e9:.1f} GB of activations"
    if needed <= SPARE * free:
        return blocks, f"{short}, and {free / 1e9:.1f} GB are free: {what} ({needed / 1e9:.1f} GB)"
    instead = f", {needed / 1e9:.1f} GB with {what}" if blocks else ""
    return blocks, (
        f"{short}{instead}, and {free / 1e9:.1f} GB are free: it may not fit; lower train.micro_batch_tokens or "
        "train.max_length"
    )


def _fewest(
    module: nn.Module, objective: Objective, batch: Batch, fits: Callable[[float], bool]
) -> tuple[list[nn.Module], float]:
    """The fewest blocks with which what is kept fits, or all layers; and the bytes that are kept then."""
    every = {level: all_blocks(module, level) for level in LEVELS}
    watched = [*every["full"], *every["mlp"]]

    def measured(level: Level) -> dict[nn.Module | None, int]:
        with gradient_checkpointing(module, every[level]):
            return _kept_by_block(module, objective, batch, watched)

    kept = _Kept(*(measured(level) for level in LEVELS))
    mlps = [block for block in kept.plain if isinstance(block, FusedGatedMlp) and kept.saved(block) > 0]
    layers = [block for block in kept.plain if block in set(every["full"]) and kept.of_layer(block, kept.plain)]
    total, chosen = float(sum(kept.plain.values())), list[nn.Module]()
    for mlp in mlps:
        total -= kept.saved(mlp)
        chosen.append(mlp)
        if fits(total):
            return chosen, total
    whole = max((kept.of_layer(layer, kept.plain) for layer in layers), default=0)  # of the one in the backward
    for layer in layers:
        total -= kept.of_layer(layer, kept.mlp) - kept.of_layer(layer, kept.full)
        inside = set(layer.modules())
        chosen = [*(block for block in chosen if block not in inside), layer]
        if fits(total + whole):
            break
    return chosen, total + (whole if layers else 0)
