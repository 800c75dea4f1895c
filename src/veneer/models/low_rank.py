"""What a fused block takes from a linear: its operands, where it carries one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraLinear, is_plain
from veneer.kernels.dropout import Dropout
from veneer.kernels.gated_mlp import LowRankLinear


def low_rank_of(layers: Sequence[nn.Module], x: Tensor) -> list[LowRankLinear] | None:
    """The operands of linears that read the same rows; None where one of them is not for a fused block.

    A linear without an adapter has an update of rank zero, several adapters are one of the sum of their ranks. They
    share a draw of dropout.
    """
    parts: list[LowRankLinear] = []
    rates: set[float] = set()
    for layer in layers:
        part = _low_rank(layer, x, rates)
        if part is None or len(rates) > 1:
            return None
        parts.append(part)
    drop = Dropout.drawn(rates.pop()) if rates else None
    return parts if drop is None else [replace(part, drop=drop) for part in parts]


def _low_rank(layer: nn.Module, x: Tensor, rates: set[float]) -> LowRankLinear | None:
    """The operands of a linear, and to ``rates`` its rate of dropout if it has adapters; None if it is not plain."""
    if not isinstance(layer, LoraLinear):
        return _without_update(layer) if is_plain(layer, x) else None
    if layer.transposed or not layer.is_plain(x):
        return None
    factors = layer.active_factors()
    if not factors:
        return _without_update(layer.base_layer)
    first, *others = factors
    rates.update(f.dropout for f in factors)
    if not others:
        return LowRankLinear(layer.weight, layer.bias, first.A, first.B, first.scaling, first.row_scale)
    if any(f.dropout or f.row_scale is not None for f in factors):
        return None  # each draws a mask of its own, or scales the base's rows too
    A, B = torch.cat([f.scaling * f.A for f in factors]), torch.cat([f.B for f in factors], 1)
    return LowRankLinear(layer.weight, layer.bias, A, B, 1.0)


def _without_update(linear: Any) -> LowRankLinear:
    weight = linear.weight
    A, B = (torch.zeros(size, device=weight.device) for size in ((0, linear.in_features), (linear.out_features, 0)))
    return LowRankLinear(weight, linear.bias, A, B, 1.0)


def split_rows(joint: LowRankLinear, sizes: Sequence[int]) -> list[LowRankLinear]:
    """A linear whose output is that of several side by side, ``sizes`` in all: each of them. Its weight is no codes."""

    def parts(t: Any) -> Sequence[Any]:
        return [None] * len(sizes) if t is None else torch.split(t, list(sizes))

    rows = zip(parts(joint.weight), parts(joint.bias), parts(joint.B), parts(joint.row_scale))
    return [replace(joint, weight=W, bias=b, B=B, row_scale=g) for W, b, B, g in rows]


def zero_update(layer: Any) -> LowRankLinear:
    """The operands of a plain linear with an update of zero: for comparing a fused block with what it replaces."""
    weight = layer.weight
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    A, B = torch.zeros(1, layer.in_features, **options), torch.zeros(layer.out_features, 1, **options)
    return LowRankLinear(weight, layer.bias, A, B, 1.0)
