"""DoRA: the size of each row of the weight is trained apart from its direction (Liu et al. 2024, eq. 5 and sec. 4.3).

    y = g (W x + s B A x) + b        g = m / n        n[o] = || W[o] + s (B A)[o] ||, a constant to the gradient

How n is found: :mod:`veneer.adapters.row_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from veneer.adapters.row_norm import forget_after_backward, row_norm
from veneer.adapters.variant import Variant

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

KEY = "lora_magnitude_vector"


class Dora(Variant):
    """The magnitude ``m [out]`` of each row, which starts as the norm of the row."""

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        adapter.magnitude = nn.Parameter(row_norm(adapter, layer).clone())

    def row_scale(self, adapter: LoraAdapter, layer: LoraLinear) -> Tensor | None:
        assert adapter.magnitude is not None
        scale = adapter.magnitude / row_norm(adapter, layer)
        forget_after_backward(adapter, scale)
        return scale

    def tensors(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        return {} if adapter.magnitude is None else {KEY: adapter.magnitude}
