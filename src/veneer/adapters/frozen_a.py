"""LoRA-FA: only B is trained (Zhang et al. 2023, "LoRA-FA"). The backward then keeps ``h = A x`` and not x.

The gradient of B that comes closest to a step of the whole update is ``(1 / s^2) dB (A A^T)^-1`` (Wang et al. 2024,
LoRA-Pro, with A fixed). Runs take that one; with an optimizer alone it is dB as it is, and a loop of one's own calls
:func:`veneer.train.hooks.step_hook`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.adapters.variant import Variant

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear


class FrozenA(Variant):
    """A is a buffer: nobody trains it, and it has no gradient."""

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        A = adapter.A.detach()
        del adapter.A
        adapter.register_buffer("A", A, persistent=False)


@torch.no_grad()
def preconditioner(A: Tensor, scaling: float) -> Tensor:
    """``[r, r]``: what the gradient of B ``[out, r]`` is multiplied with from the right."""
    gram = (A.double() @ A.double().t()) * scaling**2
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return inverse.to(A.dtype)
