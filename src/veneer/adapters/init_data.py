"""Starts that look at data: what the layers read (EVA), or the gradient of their weights (LoRA-GA).

The model runs with its adapters off. What is collected is dense, ``[in, in]`` or ``[out, in]`` per layer: as many
layers as fit into a budget of memory are watched at a time, and the batches are gone over again for the others. So the
result is exact, whatever the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from veneer.adapters.config import DATA_INITS, LoraConfig
from veneer.adapters.init import stream
from veneer.adapters.init_eva import Covariance, share_ranks
from veneer.adapters.init_lora_ga import gradient_factors
from veneer.adapters.layers import LoraAdapter, LoraLinear
from veneer.adapters.model import KEY_PREFIX, AdaptedModel
from veneer.adapters.settings import EvaConfig, LoraGaConfig
from veneer.adapters.slots import slots
from veneer.adapters.watch import Layers, gradients_watched, inputs_watched, shared_inputs
from veneer.errors import AdapterError

MEMORY_BUDGET = 2 << 30  # bytes of covariances or gradients that are held at a time

B = TypeVar("B")
Counted = Callable[[B], Tensor | None]


def initialise_from(
    adapted: AdaptedModel,
    batches: Sequence[B],
    loss: Callable[[B], Tensor],
    *,
    counted: Counted[B] = lambda batch: None,
    name: str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> str:
    """Starts an adapter (the active one) whose ``init_lora_weights`` is ``"eva"`` or ``"lora_ga"``. Its parameters are
    new ones afterwards: optimizers come later.

    Args:
        batches: what the model is run on; gone over several times.
        loss: runs the model on a batch, in evaluation mode, and returns what is minimised, a scalar.
        counted: which rows of the inputs EVA looks at, ``[T]`` bool; None: all.
        memory_budget: bytes that may be held for the layers at a time.

    Returns:
        What there is to say of it.

    Raises:
        AdapterError: the adapter does not wait for data, there is none, or no adapted layer took part.
    """
    name, config = check_waits(adapted, name)
    if not batches:
        raise AdapterError(
            f"{config.init_lora_weights} starts from rows of data, and there are none",
            where="initialise",
            fix="give it some training rows",
        )
    layers = _layers(adapted, name)
    start = _start_eva if config.init_lora_weights == "eva" else _start_lora_ga
    was_training = adapted.module.training
    adapted.module.eval()
    try:
        with adapted.disabled():
            text = start(adapted, name, layers, batches, loss, counted, memory_budget)
    finally:
        adapted.module.train(was_training)
    adapted.started(name)
    return text


def check_waits(adapted: AdaptedModel, name: str | None = None) -> tuple[str, LoraConfig]:
    """The name and the config of an adapter (the active one) that waits for data.

    Raises:
        AdapterError: it does not.
    """
    name = adapted.active if name is None else name
    if name is None or name not in adapted.waiting:
        raise AdapterError(
            "this adapter does not wait for data",
            where=f"adapter {name!r}",
            fix=f"attach one with init_lora_weights: {' or '.join(DATA_INITS)}, and initialise it once",
        )
    return name, adapted.configs[name]


def _start_eva(
    adapted: AdaptedModel,
    name: str,
    layers: Layers,
    batches: Sequence[B],
    loss: Callable[[B], Tensor],
    counted: Counted[B],
    budget: int,
) -> str:
    config, plan = adapted.configs[name], adapted.plans[name]
    settings = config.eva_config or EvaConfig()
    assert isinstance(settings, EvaConfig)
    ranks = {target.path: target.r for target in plan.lora if target.path in layers}
    with torch.no_grad():
        leaders = shared_inputs(layers, lambda: loss(batches[0]))
        if not leaders:
            raise _untouched(name)
        most = {path: min(math.floor(settings.rho * r), *layers[path][0].weight.shape) for path, r in ranks.items()}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for group in _groups({path: 4 * layers[path][0].in_features ** 2 for path in set(leaders.values())}, budget):
            followers = {p: [q for q, leader in leaders.items() if leader == p] for p in group}
            counts = {p: max(most[q] for q in followers[p]) for p in group}
            settle = {p: max(ranks[q] for q in followers[p]) for p in group}
            seen = _directions({p: layers[p] for p in group}, batches, loss, counted, counts, settle, settings.tau)
            found |= {q: seen[p] for p in group for q in followers[p]}
    found = {path: found[path] for path in ranks if path in found}  # in the model's order: ties go to the first
    shared = share_ranks({p: found[p][1][: most[p]] for p in found}, sum(ranks[p] for p in found))
    adapted.set_ranks(name, shared, keep_scaling=settings.adjust_scaling_factors)
    for path in found:
        adapter = _factors(adapted, name, path)
        with torch.no_grad():
            adapter.A.copy_(found[path][0][: adapter.r])
            adapter.B.zero_()
    used = len(set(leaders.values()))
    spread = f"ranks from {min(shared.values())} to {max(shared.values())}, {sum(shared.values())} in all"
    return f"eva: {len(found)} layers start along {used} different inputs; {spread}{_rest(layers, found)}"


def _directions(
    layers: Layers,
    batches: Sequence[B],
    loss: Callable[[B], Tensor],
    counted: Counted[B],
    counts: Mapping[str, int],
    settle: Mapping[str, int],
    tau: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The main directions of what each layer reads, and the variance that they explain.

    After 1, 2, 4, 8, ... batches a layer whose first ``settle`` directions have turned by less than ``tau`` is done.
    """
    running = {path: Covariance() for path in layers}
    last: dict[str, Tensor] = {}
    done: dict[str, tuple[Tensor, Tensor]] = {}
    mask: Tensor | None = None

    def watch(path: str, x: Tensor) -> None:
        if path not in done:
            rows = x.reshape(-1, x.shape[-1])
            chosen = mask is not None and len(mask) == len(rows) and bool(mask.any())
            running[path].add(rows[mask.to(rows.device)] if chosen and mask is not None else rows)

    with inputs_watched(layers, watch):
        for number, batch in enumerate(batches, start=1):
            mask = counted(batch)
            loss(batch)
            if number & (number - 1):
                continue
            for path in layers.keys() - done.keys():
                if running[path].count >= counts[path]:
                    V, explained = running[path].directions(counts[path])
                    now = V[: settle[path]]
                    if path in last and bool(((now * last[path]).sum(1).abs() >= tau).all()):
                        done[path] = V, explained
                    last[path] = now
            if len(done) == len(layers):
                break
    return done | {p: running[p].directions(counts[p]) for p in layers if p not in done and running[p].count}


def _start_lora_ga(
    adapted: AdaptedModel,
    name: str,
    layers: Layers,
    batches: Sequence[B],
    loss: Callable[[B], Tensor],
    counted: Counted[B],
    budget: int,
) -> str:
    config, seed = adapted.configs[name], adapted.waiting[name]
    settings = config.lora_ga_config or LoraGaConfig()
    assert isinstance(settings, LoraGaConfig)
    started: set[str] = set()
    groups = list(_groups({path: 4 * layer[0].weight.shape.numel() for path, layer in layers.items()}, budget))
    for group in groups:
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad(), gradients_watched({path: layers[path] for path in group}, gradients):
            for batch in batches:
                value = loss(batch)
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]  # torch's own
        for path, gradient in gradients.items():
            adapter, layer = _factors(adapted, name, path), layers[path][0]
            key = f"{KEY_PREFIX}{path}.A"
            A, B = gradient_factors(gradient, layer.rows(), adapter.r, adapter.scaling, settings, stream(seed, key))
            with torch.no_grad():
                adapter.A.copy_(A)
                adapter.B.copy_(B)
        started |= gradients.keys()
    if not started:
        raise _untouched(name)
    passes = f"{len(groups)} passes" if len(groups) > 1 else "one pass"
    rank = f"its file is a plain LoRA of up to rank {2 * config.r} for the untouched base"
    return f"lora_ga: {len(started)} layers start along their gradients, in {passes}; {rank}{_rest(layers, started)}"


def _groups(sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """The paths in order, as many at a time as fit into ``budget`` bytes, and at least one."""
    group: list[str] = []
    total = 0
    for path, size in sizes.items():
        if group and total + size > budget:
            yield group
            group, total = [], 0
        group.append(path)
        total += size
    if group:
        yield group


def _layers(adapted: AdaptedModel, name: str) -> dict[str, list[LoraLinear]]:
    """The linears of an adapter; those that share their factors together."""
    found: dict[int, tuple[str, list[LoraLinear]]] = {}
    for path, slot in slots(adapted.module):
        if isinstance(slot, LoraLinear) and name in slot.adapters:
            found.setdefault(id(slot.adapters[name]), (path, []))[1].append(slot)
    return dict(found.values())


def _factors(adapted: AdaptedModel, name: str, path: str) -> LoraAdapter:
    slot = dict(slots(adapted.module))[path]
    adapter = slot.adapters[name]
    assert isinstance(adapter, LoraAdapter)
    return adapter


def _rest(layers: Layers, started: Collection[str]) -> str:
    left = [path for path in layers if path not in started]
    return f"; {len(left)} layers that no row reached start as by default ({left[0]})" if left else ""


def _untouched(name: str) -> AdapterError:
    return AdapterError(
        "no row of data reached a layer of this adapter",
        where=f"adapter {name!r}",
        fix="the loss has to run the model that the adapter is on",
    )
