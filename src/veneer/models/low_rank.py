"""What a fused block takes from a linear: its operands, where it carries one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraLinear
from veneer.kernels.dropout import Dropout
from veneer.kernels.gated_mlp import LowRankLinear


def low_rank_of(layers: Sequence[nn.Module], x: Tensor) -> list[LowRankLinear] | None:
    """The operands of linears that read the same rows; None where one of them is not for a fused block.

    They share a draw of dropout.
    """
    parts = [_low_rank(layer, x) for layer in layers]
    found = [part for part, _ in filter(None, parts)]
    rates = {rate for _, rate in filter(None, parts)}
    if len(found) < len(parts) or len(rates) > 1:
        return None
    drop = Dropout.drawn(rates.pop())
    return found if drop is None else [replace(part, drop=drop) for part in found]


def _low_rank(layer: nn.Module, x: Tensor) -> tuple[LowRankLinear, float] | None:
    """The operands of a linear that carries exactly one active adapter, and its rate of dropout; else None."""
    if not isinstance(layer, LoraLinear) or layer.transposed or not layer.is_plain(x):
        return None
    factors = layer.active_factors()
    if len(factors) != 1:
        return None
    only = factors[0]
    return LowRankLinear(layer.weight, layer.bias, only.A, only.B, only.scaling, only.row_scale), only.dropout


def zero_update(layer: Any) -> LowRankLinear:
    """The operands of a plain linear with an update of zero: for comparing a fused block with what it replaces."""
    weight = layer.weight
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    A, B = torch.zeros(1, layer.in_features, **options), torch.zeros(layer.out_features, 1, **options)
    return LowRankLinear(weight, layer.bias, A, B, 1.0)
