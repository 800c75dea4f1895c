"""EVA: A starts at the main directions of what the layer reads, B at zero (Paischer et al. 2024, alg. 1).

    C = mean of (x - mean)(x - mean)^T over the rows x of the input        A = its first eigenvectors

``C`` is summed up while rows stream by. Ranks then go where a direction explains most of its layer's variance:
of all eigenvalues over their layer's total, the largest, as many as the adapter has ranks. Every layer keeps one.
B is zero, so the first output is the base's, and nothing has to be taken off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from veneer.adapters.init_svd import random_triplets
from veneer.adapters.sample import Sample
from veneer.adapters.settings import EvaConfig
from veneer.adapters.watch import inputs_watched, shared_inputs

Batch = TypeVar("Batch")
_EXACT = 1024  # columns up to which all eigenvectors are computed; beyond, the first ones by eight random rounds
_ROUNDS = 8


def start(sample: Sample[Batch]) -> str:
    """Starts the factors, and says how."""
    adapted, name, layers = sample.adapted, sample.name, sample.layers
    settings = sample.config.eva_config or EvaConfig()
    assert isinstance(settings, EvaConfig)
    ranks = {target.path: target.r for target in adapted.plans[name].lora if target.path in layers}
    with torch.no_grad():
        leaders = shared_inputs(layers, lambda: sample.loss(sample.batches[0]))
        leaders |= {path: path for path in layers if path not in leaders}  # an expert may get its first row later
        most = {path: min(math.floor(settings.rho * r), *layers[path][0].weight.shape) for path, r in ranks.items()}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for group in sample.groups({path: 4 * layers[path][0].in_features ** 2 for path in set(leaders.values())}):
            followers = {p: [q for q, leader in leaders.items() if leader == p] for p in group}
            counts = {p: max(most[q] for q in followers[p]) for p in group}
            settle = {p: max(ranks[q] for q in followers[p]) for p in group}
            seen = _directions(sample, group, counts, settle, settings.tau)
            found |= {q: seen[p] for p in group if p in seen for q in followers[p]}
    rest = sample.rest(found)
    found = {path: found[path] for path in ranks if path in found}  # in the model's order: ties go to the first
    shared = share_ranks({p: found[p][1][: most[p]] for p in found}, sum(ranks[p] for p in found))
    adapted.set_ranks(name, shared, keep_scaling=settings.adjust_scaling_factors)
    for path in found:
        adapter = sample.factors(path)
        with torch.no_grad():
            adapter.A.copy_(found[path][0][: adapter.r])
            adapter.B.zero_()
    used = len({leaders[path] for path in found})
    spread = f"ranks from {min(shared.values())} to {max(shared.values())}, {sum(shared.values())} in all"
    return f"eva: {len(found)} layers start along {used} different inputs; {spread}{rest}"


def _directions(
    sample: Sample[Batch], group: Sequence[str], counts: Mapping[str, int], settle: Mapping[str, int], tau: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """The main directions of what each layer reads, and the variance that they explain.

    After 1, 2, 4, 8, ... batches a layer whose first ``settle`` directions have turned by less than ``tau`` is done.
    """
    layers = {path: sample.layers[path] for path in group}
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
        for number, batch in enumerate(sample.batches, start=1):
            mask = sample.counted(batch)
            sample.loss(batch)
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


class Covariance:
    """The covariance of the rows of a layer's input, from batches of them."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None  # [in], a first guess of the mean: large means would cost digits
        self._sum: Tensor
        self._products: Tensor

    def add(self, x: Tensor) -> None:
        """``x [T, in]``: more rows, or none (an expert that no token of the batch chose)."""
        if not len(x):
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self._shift is None:
            self._shift = x.mean(0)
            self._sum, self._products = torch.zeros_like(self._shift), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(0)
        self._products.addmm_(x.t(), x)

    def directions(self, count: int) -> tuple[Tensor, Tensor]:
        """``(V [count, in], [count])``: the first eigenvectors, and the share of the variance that each explains."""
        mean = self._sum / self.count
        C = self._products / self.count - torch.outer(mean, mean)
        if len(C) <= _EXACT:
            values, vectors = torch.linalg.eigh(C.double())
            S, V = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
            V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
        else:
            _, S, V = random_triplets(C, count, _ROUNDS, torch.Generator().manual_seed(0))
        return V.t(), S / C.diagonal().sum().clamp(min=torch.finfo(C.dtype).tiny)


def share_ranks(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many directions each layer gets, by what they explain; ``budget`` in all, and at least one each.

    Args:
        explained: by path: the share of the layer's variance that each direction explains, falling. A layer gets no
            more ranks than it has entries.
    """
    ranks = dict.fromkeys(explained, 1)
    others = [(-float(share), order, path) for order, path in enumerate(explained) for share in explained[path][1:]]
    for _, _, path in sorted(others)[: max(0, budget - len(ranks))]:
        ranks[path] += 1
    return ranks
