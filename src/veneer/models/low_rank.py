"""What a fused block takes from a linear: its operands, where it carries one plain adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraLinear
from veneer.kernels.gated_mlp import LowRankLinear


def low_rank(layer: nn.Module, x: Tensor) -> LowRankLinear | None:
    """The operands of a linear that carries exactly one active adapter and no dropout in force; else None."""
    if not isinstance(layer, LoraLinear) or layer.transposed or not layer.is_plain(x):
        return None
    factors = layer.active_factors()
    if len(factors) != 1 or factors[0].dropout:
        return None
    only = factors[0]
    return LowRankLinear(layer.weight, layer.bias, only.A, only.B, only.scaling, only.row_scale)


def zero_update(layer: Any) -> LowRankLinear:
    """The operands of a plain linear with an update of zero: for comparing a fused block with what it replaces."""
    weight = layer.weight
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    A, B = torch.zeros(1, layer.in_features, **options), torch.zeros(layer.out_features, 1, **options)
    return LowRankLinear(weight, layer.bias, A, B, 1.0)
