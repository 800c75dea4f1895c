"""LoftQ of several rounds: while the adapter acts, codes of its own stand in for those of the base.

    y = Q x + s B A x        with Q other codes than the base's, so that W ~ Q + s B0 A0 at the start

The base keeps its codes, and is itself with the adapter off. Against the weights before they were quantised the update
is ``s (B A - B0 A0)``, up to ``W - Q - s B0 A0``: that is what is saved, a plain LoRA of twice the rank for the model
in 16 bits, in the form of :mod:`veneer.adapters.residual`. Nobody else has these codes.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.adapters.residual import Residual
from veneer.quant import QuantizedLinear, QuantizedTensor

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

KEY = "loftq"


def codes_like(base: QuantizedLinear, codes: QuantizedTensor) -> QuantizedLinear:
    """A linear over ``codes`` with the bias of ``base``, in memory that is not the base's: state is loaded into it."""
    own = copy.deepcopy(QuantizedLinear(codes))
    own.register_parameter("bias", base.bias)
    return own


class OwnCodes(Residual):
    """The codes that :mod:`veneer.adapters.init_loftq` found; those of the base until then. None over plain weights."""

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        super().start(adapter, layer)
        base = layer.base_layer
        if adapter.own is None and isinstance(base, QuantizedLinear):
            adapter.own = codes_like(base, base.weight)

    def factors(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, B

    def portable(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return super().factors(adapter, A, B)

    def tensors(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        own = () if adapter.own is None else adapter.own.named_buffers()
        return super().tensors(adapter) | {f"{KEY}.{name}": tensor for name, tensor in own}
