"""A frozen linear with a low-rank update, as one differentiable operation.

``y = x W^T + b + s (x A^T) B^T``  (Hu et al. 2021, eq. 3)

The backward multiplies the small matrices first and never forms ``dW`` or ``B A``:

    P  = dY B          [T, r]
    dA = s P^T x       [r, in]
    dB = s dY^T h      [out, r]      with h = x A^T kept from the forward
    dx = dY W + s P A  [T, in]

Kept for the backward: ``x`` once, in its own dtype, and ``h``.
Names: ``T`` rows (all leading dimensions flattened), ``r`` rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels.frozen import Weight, as_tensor, matmul_grad, matmul_weight


def lora_linear_reference(
    x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """The operation in plain PyTorch, differentiable in everything; the oracle of :func:`lora_linear`."""
    h = F.linear(x, A.to(x.dtype))
    return F.linear(x, as_tensor(weight), bias) + scaling * F.linear(h, B.to(x.dtype))


def lora_linear(x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``x W^T + b + scaling (x A^T) B^T``.

    Args:
        x: ``[..., in]``, in the base's dtype.
        weight: ``[out, in]`` frozen, a tensor or codes, same dtype as ``x``.
        bias: ``[out]`` frozen, or None.
        A: ``[r, in]`` float32 master: cast to ``x``'s dtype for the products; its gradient comes back in float32.
        B: ``[out, r]`` float32 master, likewise.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)``.

    Returns:
        ``[..., out]`` in ``x``'s dtype.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return lora_linear_reference(x, weight, bias, A, B, scaling)
    result: Tensor = _LoraLinear.apply(x, weight, bias, A, B, scaling)  # type: ignore[no-untyped-call]  # torch's own
    return result


def low_rank_forward(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """``(y [T, out], h [T, r])`` for flat ``x [T, in]``; every operand in ``x``'s dtype."""
    h = x @ a.t()
    y = matmul_weight(x, weight, bias)
    y.addmm_(h, b.t(), alpha=s)
    return y, h


def low_rank_grads(dy: Tensor, x: Tensor, h: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(P [T, r], dA [r, in], dB [out, r])`` for ``dy [T, out]``; ``P = dY B`` serves both dA and dx."""
    p = dy @ b
    return p, (p.t() @ x).mul_(s), (dy.t() @ h).mul_(s)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = A.to(x.dtype), B.to(x.dtype)
        y, h = low_rank_forward(flat, weight, bias, a, b, scaling)
        ctx.save_for_backward(flat, h, a, b)
        ctx.weight, ctx.scaling, ctx.dtypes = weight, scaling, (A.dtype, B.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        p, da, db = low_rank_grads(flat, x, h, b, ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = matmul_grad(flat, ctx.weight)
            dx.addmm_(p, a, alpha=ctx.scaling)
            dx = dx.view(*dy.shape[:-1], x.shape[-1])
        return dx, None, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None
