"""How an adapter's factors start. Every tensor has a random stream of its own, named by the seed and the tensor's key.

So the same seed gives the same adapter whatever else the model holds, on every device, and under every adapter name.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.adapters.init_olora import orthonormal_factors
from veneer.adapters.init_pissa import principal_factors

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

# The bound of nn.Linear's own initialisation, which PEFT uses for A: U(-1/sqrt(in), 1/sqrt(in)).
_KAIMING_A = math.sqrt(5)


def stream(seed: int, key: str) -> torch.Generator:
    """The generator (on the CPU) of the tensor ``key`` under ``seed``."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_linear(A: Tensor, B: Tensor, method: bool | str, seed: int, key: str) -> None:
    """Fills the factors of a linear, in place.

    Args:
        A: ``[r, in]``.
        B: ``[out, r]``.
        method: True (Kaiming uniform A, zero B), ``"gaussian"`` (A ~ N(0, (1/r)^2), zero B), ``"orthogonal"`` (both
            non-zero with ``B A = 0``; ``r`` even), ``"adalora"`` (both ~ N(0, 0.02^2)), False (both as a fresh
            ``nn.Linear``).
        seed: the adapter's seed.
        key: the module's key, without the factor's name.
    """
    r = A.shape[0]
    for_A, for_B = stream(seed, f"{key}.A"), stream(seed, f"{key}.B")
    a, b = torch.empty(A.shape), torch.zeros(B.shape)
    if method == "gaussian":
        a.normal_(std=1 / r, generator=for_A)
    elif method == "adalora":
        a.normal_(std=0.02, generator=for_A)
        b.normal_(std=0.02, generator=for_B)
    elif method == "orthogonal":
        # Rows of one orthogonal matrix: those of the two halves are perpendicular, so that B A = 0 with neither zero.
        q, _ = torch.linalg.qr(torch.randn(r, r, generator=for_A))
        a = (torch.randn(A.shape[1], r // 2, generator=for_A) @ q[0::2]).t() / 10
        b = torch.randn(r // 2, B.shape[0], generator=for_B).t() @ q[1::2] / 10
    else:
        nn.init.kaiming_uniform_(a, a=_KAIMING_A, generator=for_A)
        if method is False:
            nn.init.kaiming_uniform_(b, a=_KAIMING_A, generator=for_B)
    A.copy_(a)
    B.copy_(b)


@torch.no_grad()
def init_from_weight(adapter: LoraAdapter, layer: LoraLinear, method: str, seed: int, key: str) -> None:
    """Fills the factors of an adapter from its layer's weight, in place.

    Args:
        method: ``"pissa"``, ``"pissa_niter_N"`` (N rounds of a randomised SVD) or ``"olora"``.
        seed, key: as for :func:`init_linear`.
    """
    if method == "olora":
        A, B = orthonormal_factors(layer.rows(), adapter.r)
    else:
        rounds = int(method.rpartition("_")[2]) if method != "pissa" else None
        A, B = principal_factors(layer.rows(), adapter.r, adapter.scaling, rounds, stream(seed, f"{key}.A"))
    adapter.A.copy_(A)
    adapter.B.copy_(B)


@torch.no_grad()
def init_embedding(A: Tensor, B: Tensor, method: bool | str, seed: int, key: str) -> None:
    """Fills the factors of an embedding, in place: A ``[r, V]`` zero, B ``[d, r]`` standard normal.

    ``method`` False makes A normal too; the other methods mean the same for an embedding, as in PEFT.
    """
    A.zero_()
    if method is False:
        A.copy_(torch.randn(A.shape, generator=stream(seed, f"{key}.A")))
    B.copy_(torch.randn(B.shape, generator=stream(seed, f"{key}.B")))
