"""Adapters on layers whose owner takes the weight instead of calling the layer.

The state spaces of the first Mamba multiply with ``dt_proj.weight`` themselves: an adapter beside the layer would never
be asked. While such an owner runs, what stands under the layer's name has the adapted weight, ``g (W + s B' A')``; the
layers are small, so that the dense product costs little. Dropout on the input of A has no place there: it is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraLinear
from veneer.adapters.structure import is_read
from veneer.kernels.matmul import as_tensor


class _StandIn:
    """What the owner finds under the layer's name while it runs."""

    def __init__(self, layer: LoraLinear) -> None:
        self._layer = layer
        self.weight, self.bias = adapted_weight(layer), layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._layer(x)
        return y


def let_read(owner: nn.Module, name: str) -> None:
    """Lets ``owner`` find the adapted weight of its layer ``name``, if it is one that reads it. Once is enough.

    Without an active adapter the owner finds its own layer: adapter off is the base bit for bit.
    """
    key = f"_veneer_reads_{name}"
    if not is_read(owner, name) or key in owner.__dict__:
        return

    def before(module: nn.Module, *_: Any) -> None:
        layer = module._modules[name]
        if isinstance(layer, LoraLinear) and layer.active:
            module.__dict__[name] = _StandIn(layer)  # found before the modules are asked

    def after(module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(name, None)

    owner.register_forward_pre_hook(before)
    owner.register_forward_hook(after, always_call=True)
    owner.__dict__[key] = True


def adapted_weight(layer: LoraLinear) -> Tensor:
    """``[out, in]`` of the base's dtype: the weight with the adapters that act now; differentiable in their factors."""
    weight = as_tensor(layer.weight)
    rows = weight.t() if layer.transposed else weight
    total = rows.to(torch.promote_types(rows.dtype, torch.float32))
    base = total
    for f in layer.active_factors():
        change = f.scaling * (f.B @ f.A)
        if f.row_scale is not None:
            change = f.row_scale[:, None] * (base + change) - base
        total = total + change
    return total.to(rows.dtype)
