"""EVA: A starts at the main directions of what the layer reads, B at zero (Paischer et al. 2024, alg. 1).

    C = mean of (x - mean)(x - mean)^T over the rows x of the input        A = its first eigenvectors

``C`` is summed up while rows stream by. Ranks then go where a direction explains most of its layer's variance:
of all eigenvalues over their layer's total, the largest, as many as the adapter has ranks. Every layer keeps one.
B is zero, so the first output is the base's, and nothing has to be taken off.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.adapters.init_svd import random_triplets

_EXACT = 1024  # columns up to which all eigenvectors are computed; beyond, the first ones by eight random rounds
_ROUNDS = 8


class Covariance:
    """The covariance of the rows of a layer's input, from batches of them."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None  # [in], a first guess of the mean: large means would cost digits
        self._sum: Tensor
        self._products: Tensor

    def add(self, x: Tensor) -> None:
        """``x [T, in]``: more rows."""
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
