"""AdaLoRA: ranks go to the modules where they matter, while training (Zhang et al. 2023).

    y = W x + s B (E * A) x        E [r, 1] starts at zero, A and B at N(0, 0.02^2)

A triplet (a row of A, its entry of E, a column of B) is dropped by setting its E to zero, which is undone if it proves
important later; which ones is up to the training step (:mod:`veneer.train.rank_budget`): with an optimizer alone, all
ranks stay, and a loop of one's own calls :func:`veneer.train.hooks.step_hook`. What is saved are the plain factors
``A' = E * A`` and ``B' = B`` of the triplets that are left.

``s = alpha / r`` with the rank that all modules start with, however many triplets are left. PEFT divides by
``r + 1e-5`` instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.variant import Variant
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

KEY = "lora_E"
_PREFIX = "base_model.model."
# PEFT's keys that say how AdaLoRA was trained; lora_alpha is divided by init_r, not r.
_OF_TRAINING = ("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step")


class AdaLora(Variant):
    """The singular values ``E [r, 1]``."""

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        adapter.E = nn.Parameter(adapter.A.new_zeros(adapter.r, 1))

    def factors(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        assert adapter.E is not None
        return adapter.E * A, B

    def portable(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        assert adapter.E is not None
        kept = adapter.E[:, 0] != 0
        if not kept.any():
            kept[0] = True  # one rank of zeros: PEFT's files know no rank 0
        return A[kept], B[:, kept]

    def tensors(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        return {} if adapter.E is None else {KEY: adapter.E}


@torch.no_grad()
def trim(adapter: LoraAdapter) -> None:
    """Makes an adapter plain LoRA of the triplets that are left; what it computes stays."""
    tensors = adapter.portable()
    adapter.A, adapter.B = (nn.Parameter(tensors[f"lora_{factor}.weight"].clone()) for factor in "AB")
    adapter.E, adapter.variants = None, ()


@torch.no_grad()
def orthogonality(factors: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> Tensor:
    """``R = mean over P of || P P^T - I ||``, and adds ``weight dR`` to the gradients.

    The paper's eq. 4 sums the squares; this is PEFT's form, which its usual weight of 0.5 goes with. With
    ``C = P P^T - I`` the gradient is ``2 C P / || C ||``.

    Args:
        factors: every P ``[r, width]``, a direction in each row: A, and B transposed.
        gradients: a view for each, added to in place.
        weight: of the term.

    Returns:
        ``R``, a scalar.
    """
    total = factors[0].new_zeros(())
    shapes: dict[torch.Size, list[int]] = {}
    for index, factor in enumerate(factors):
        shapes.setdefault(factor.shape, []).append(index)
    for alike in shapes.values():
        P = torch.stack([factors[index] for index in alike])  # [n, r, width]
        C = P @ P.mT
        C.diagonal(dim1=1, dim2=2).sub_(1)
        norm = torch.linalg.matrix_norm(C)  # [n]
        total += norm.sum()
        C *= (2 * weight / len(factors) / norm.clamp(min=torch.finfo(norm.dtype).tiny))[:, None, None]
        for index, change in zip(alike, C @ P):
            gradients[index].add_(change)
    return total / len(factors)


def is_adalora(data: Mapping[str, Any]) -> bool:
    """Whether a config of PEFT's is AdaLoRA's."""
    return data.get("peft_type") == "ADALORA"


def as_plain(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's AdaLoRA files as those of a plain LoRA that computes the same: E in A, a rank for each module.

    Raises:
        AdapterError: a factor is missing.
    """
    plain = dict(tensors)
    ranks: dict[str, int] = {}
    for key in tensors:
        if not key.endswith(f".{KEY}"):
            continue
        place = key.removesuffix(f".{KEY}")
        try:
            E, A, B = (plain.pop(f"{place}.lora_{name}") for name in "EAB")
        except KeyError as error:
            raise AdapterError(f"missing tensor {error}", where=where, fix="save the adapter again") from error
        if len(E) == 0:  # all of the module's ranks were dropped
            E, A, B = E.new_zeros(1, 1), A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        plain[f"{place}.lora_A.weight"], plain[f"{place}.lora_B.weight"] = E * A, B
        ranks[re.escape(place.removeprefix(_PREFIX))] = len(E)
    scaling = data.get("lora_alpha", 8) / (data.get("init_r", 12) + 1e-5)
    config = {key: value for key, value in data.items() if key not in (*_OF_TRAINING, "init_r")}
    config |= {
        "peft_type": "LORA",
        "use_rslora": False,  # PEFT's AdaLoRA does not look at it
        "rank_pattern": ranks,
        "alpha_pattern": {path: scaling * rank for path, rank in ranks.items()},
    }
    return config, plain
