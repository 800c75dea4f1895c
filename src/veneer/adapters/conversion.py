"""What it took to write an adapter with a start away from zero (PiSSA, OLoRA, LoRA-GA) as a plain LoRA.

    trained:  s (B A - B0 A0)        in the file:  s B' A',  with twice the rank

Exact but for the rounding of the file's numbers, which is measured here, from the factors: with ``P Q`` the trained
update and ``d`` for file less trained,  ``B' A' - P Q = [dB, P] [A'; dA]``,  and ``|| U V ||^2 = tr(U^T U V V^T)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraAdapter
from veneer.adapters.model import KEY_PREFIX, AdaptedModel
from veneer.adapters.residual import Residual
from veneer.adapters.save import read_adapter


@dataclass(frozen=True)
class Conversion:
    """How far the plain LoRA in a file is from the adapter that was trained.

    Attributes:
        start: the name of the start.
        rank: of the file, the largest; of the training, ``trained_rank``.
        error: ``|| file - trained || / || trained ||`` of the updates, over all layers; 0 where nothing was trained.
    """

    start: str
    rank: int
    trained_rank: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.start}: the file is a plain LoRA of rank {self.rank} (trained with {self.trained_rank}) for the "
            f"untouched base, its update {self.error:.1e} of its size off the trained one"
        )


def conversion_of(adapted: AdaptedModel, folder: str | Path, name: str | None = None) -> Conversion | None:
    """Compares a folder that an adapter (the active one) was just saved in with the adapter.

    Returns:
        The comparison; None where the file holds the very factors that are trained.

    Raises:
        AdapterError: the folder holds no such adapter.
    """
    adapters = {path: adapter for path, adapter in adapted.linears(name).items() if _is_converted(adapter)}
    if not adapters:
        return None
    tensors = read_adapter(folder)[1]
    off = size = 0.0
    ranks = []
    for path, adapter in adapters.items():
        A, B = (tensors[f"{KEY_PREFIX}{path}.lora_{factor}.weight"] for factor in "AB")
        ranks.append(len(A))
        more, whole = _squares(adapter, A, B)
        off, size = off + more, size + whole
    method = str(adapted.configs[name or adapted.active or ""].init_lora_weights)
    return Conversion(method, max(ranks), max(a.r for a in adapters.values()), (off / size) ** 0.5 if size else 0.0)


def _is_converted(adapter: LoraAdapter) -> bool:
    """With codes of its own (LoftQ) the file is for other weights than those that were trained over."""
    return adapter.own is None and any(isinstance(variant, Residual) for variant in adapter.variants)


@torch.no_grad()
def _squares(adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[float, float]:
    """``|| s (B' A' - P Q) ||^2`` and ``|| s P Q ||^2``, with the file's ``A'`` and ``B'``."""
    own: Mapping[str, Tensor] = {key: getattr(adapter, key).double().cpu() for key in ("A", "B", "A0", "B0")}
    P, Q = own["B"] - own["B0"], own["A"]
    if isinstance(adapter.A, nn.Parameter):
        P, Q = torch.cat((P, own["B0"]), 1), torch.cat((Q, own["A"] - own["A0"]))
    A, B = A.double(), B.double()
    off = _square(torch.cat((B - P, P), 1), torch.cat((A, A - Q)))
    return adapter.scaling**2 * off, adapter.scaling**2 * _square(P, Q)


def _square(U: Tensor, V: Tensor) -> float:
    return max(0.0, float(((U.t() @ U) * (V @ V.t())).sum()))
