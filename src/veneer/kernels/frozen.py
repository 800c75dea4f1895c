"""Products with a frozen weight, whatever it is stored in: a plain tensor, or codes that are decoded on the way.

    y  = x W^T + b        dx = dY W

Nothing is kept for the backward but a reference to the weight itself: a weight in codes is decoded again.
Names: ``T`` rows (all leading dimensions flattened).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels import native
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
    y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    # By autograd's own view: what a function returns as a view, nobody may write to.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def take_over(linear: nn.Module) -> None:
    """Gives an ``nn.Linear`` the product that an adapter over it is added to, where that is not PyTorch's own.

    A fresh adapter then changes no bit, and a disabled one none either.
    """
    if type(linear) is nn.Linear and native.can_take(linear.weight[:0], function="matmul"):
        linear.forward = types.MethodType(_forward, linear)  # type: ignore[method-assign]  # on this instance


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody else than :func:`take_over` has put a forward onto the instance."""
    return getattr(module.__dict__.get("forward", _forward), "__func__", _forward) is not _forward


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    is_frozen = not any(p.requires_grad for p in self.parameters())
    if not is_frozen or x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, self.weight, self.bias)
    return frozen_linear(x, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return sum_of_products(Turned(x.reshape(-1, x.shape[-1]), weight), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return sum_of_products(Plain(dy, ctx.weight)).view(ctx.shape), None, None
