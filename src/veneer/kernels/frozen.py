"""Products with a frozen weight, whatever it is stored in: a plain tensor, or codes that are decoded on the way.

    y  = x W^T + b        dx = dY W

Nothing is kept for the backward but a reference to the weight itself: a weight in codes is decoded again.
Names: ``T`` rows (all leading dimensions flattened).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels.check import checked
from veneer.kernels.matmul import Plain, Turned, Weight, as_tensor, sum_of_products


def frozen_linear_reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The operation in plain PyTorch; the oracle of :func:`frozen_linear`."""
    return F.linear(x, as_tensor(weight), bias)


@checked("frozen linear", frozen_linear_reference, "x")
def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, differentiable in ``x`` alone.

    Args:
        x: ``[..., in]`` in the weight's dtype.
        weight: ``[out, in]`` frozen.
        bias: ``[out]`` frozen, or None.

    Returns:
        ``[..., out]`` in ``x``'s dtype.
    """
    result: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = sum_of_products(Turned(x.reshape(-1, x.shape[-1]), weight), bias=bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = sum_of_products(Plain(dy.reshape(-1, dy.shape[-1]), ctx.weight))
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None
