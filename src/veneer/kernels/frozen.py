"""Products with a frozen weight, whatever it is stored in: a plain tensor, or codes that are decoded on the way.

    y  = x W^T + b        dx = dY W

Nothing is kept for the backward but a reference to the weight itself: a weight in codes is decoded again.
Names: ``T`` rows (all leading dimensions flattened).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels.check import checked


class FrozenMatrix(Protocol):
    """What the fused operations need of a frozen ``[out, in]`` weight that is not a plain tensor."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the dtype of :meth:`dequantize` and of both products."""

    @property
    def device(self) -> torch.device: ...

    @property
    def requires_grad(self) -> bool:
        """Always False."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, in]`` to ``x W^T + b [T, out]``."""

    def grad_input(self, dy: Tensor) -> Tensor:
        """``dy [T, out]`` to ``dY W [T, in]``."""

    def dequantize(self) -> Tensor:
        """``[out, in]``, the weight that both products compute with."""


Weight: TypeAlias = Tensor | FrozenMatrix


def matmul_weight(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for flat ``x [T, in]``; outside of autograd."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.linear(x, bias)


def matmul_grad(dy: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """``dY W`` for flat ``dy [T, out]``; written over ``out [T, in]`` where that is given. Outside of autograd."""
    if isinstance(weight, Tensor):
        return dy @ weight if out is None else torch.mm(dy, weight, out=out)
    dx = weight.grad_input(dy)
    return dx if out is None else out.copy_(dx)


def add_matmul_grad(dx: Tensor, dy: Tensor, weight: Weight) -> Tensor:
    """``dX + dY W`` in the place of ``dx [T, in]``. Outside of autograd."""
    return dx.addmm_(dy, weight) if isinstance(weight, Tensor) else dx.add_(weight.grad_input(dy))


def as_tensor(weight: Weight) -> Tensor:
    """The weight as a plain tensor: itself, or what its codes stand for."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


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
        y = matmul_weight(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = matmul_grad(dy.reshape(-1, dy.shape[-1]), ctx.weight)
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None
