"""Factors that start away from zero and leave the base alone: what they start at is taken off again.

    y = W x + s (B A - B0 A0) x = W x + s ((B - B0) A + B0 (A - A0)) x        A = A0 and B = B0 at the start

PiSSA (Meng et al. 2024, eq. 2 to 4), OLoRA (Büyükakyüz 2024) and LoRA-GA (Wang et al. 2024) write ``W - s B0 A0`` into
the base instead, which rounds it and makes "adapter off" another model. Here the base stays what it is.

The right form is what acts and what is saved: a plain LoRA of twice the rank, ``A' = [A; A - A0]`` and
``B' = [B - B0, B0]``, exact on the untouched base. It is zero to the last bit at the start, and small steps survive it
in 16 bits, where ``[A; A0]`` and ``[B, -B0]`` would lose whatever is smaller than the rounding of what they start at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.adapters.variant import Variant

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

A_KEY, B_KEY = "lora_A.start", "lora_B.start"


class Residual(Variant):
    """A frozen copy of the factors as they started, in the base's dtype."""

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        with torch.no_grad():
            for factor in (adapter.A, adapter.B):
                # To the last bit what is taken off, though that is kept in fewer bits.
                factor.copy_(factor.to(layer.weight.dtype))
        adapter.register_buffer("A0", adapter.A.detach().to(layer.weight.dtype, copy=True), persistent=False)
        adapter.register_buffer("B0", adapter.B.detach().to(layer.weight.dtype, copy=True), persistent=False)

    def factors(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        B0 = adapter.B0.to(B.dtype)
        if not isinstance(adapter.A, nn.Parameter):
            return A, B - B0  # A is frozen where it started: the second half would be zero
        return torch.cat((A, A - adapter.A0.to(A.dtype))), torch.cat((B - B0, B0), dim=1)

    def tensors(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        return {A_KEY: adapter.A0, B_KEY: adapter.B0}
