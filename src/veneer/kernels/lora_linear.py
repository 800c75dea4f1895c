"""A frozen linear with a low-rank update, as one differentiable operation.

``y = g (x W^T + s (D x A^T) B^T) + b``  (Hu et al. 2021, eq. 3; with a row scale g: Liu et al. 2024, eq. 5; with D, a
mask of dropout on what A sees, else 1)

The backward multiplies the small matrices first and never forms ``dW`` or ``B A``. With ``G = dY g``, one pass:

    P  = G B           [T, r]
    dA = s P^T D x     [r, in]
    dB = s G^T h       [out, r]      with h = D x A^T kept from the forward
    dx = G W + D s P A [T, in]
    dg = sum over T of dY z / g      with z = g (x W^T + s h B^T) kept from the forward

Kept for the backward: ``x`` once, in its own dtype (not where A is frozen), ``h``, and with a row scale ``z``, which
without a bias is the output itself; D is made again. A row whose scale is exactly zero gets no gradient of it.
Names: ``T`` rows (all leading dimensions flattened), ``r`` rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels.check import checked
from veneer.kernels.dropout import Dropout
from veneer.kernels.frozen import Weight, as_tensor, matmul_grad, matmul_weight


def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    row_scale: Tensor | None = None,
    drop: Dropout | None = None,
) -> Tensor:
    """The operation in plain PyTorch, differentiable in everything; the oracle of :func:`lora_linear`."""
    h = F.linear(x if drop is None else drop(x), A.to(x.dtype))
    y = F.linear(x, as_tensor(weight)) + scaling * F.linear(h, B.to(x.dtype))
    if row_scale is not None:
        y = y + (row_scale - 1).to(y.dtype) * y
    return y if bias is None else y + bias


@checked("LoRA linear", lora_linear_reference, "x", "A", "B", "row_scale")
def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    row_scale: Tensor | None = None,
    drop: Dropout | None = None,
) -> Tensor:
    """``g (x W^T + scaling (x A^T) B^T) + b``.

    Args:
        x: ``[..., in]``, in the base's dtype.
        weight: ``[out, in]`` frozen, a tensor or codes, same dtype as ``x``.
        bias: ``[out]`` frozen, or None.
        A: ``[r, in]`` float32 master: cast to ``x``'s dtype for the products; its gradient comes back in float32.
        B: ``[out, r]`` float32 master, likewise.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)``.
        row_scale: ``g [out]`` float32, or None for ones. Its difference from 1 is what acts: near 1, 16 bits would lose
            all but the first digits of it.
        drop: dropout on what A sees, or None.

    Returns:
        ``[..., out]`` in ``x``'s dtype.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return lora_linear_reference(x, weight, bias, A, B, scaling, row_scale, drop)
    A, B = whole_rank(A, B, x.dtype)
    result: Tensor = _LoraLinear.apply(x, weight, bias, A, B, scaling, row_scale, drop)  # type: ignore[no-untyped-call]  # torch's own
    return result


def whole_rank(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors with rows and columns of zeros up to a rank that is a multiple of 8, which change no result.

    In 16 bits, where products of other widths are slow or need code of their own: with as many ranks as EVA gives, the
    code for them took a tenth of a step on a CPU.
    """
    lacking = -len(A) % 8
    if not lacking or dtype.itemsize != 2:
        return A, B
    return F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking))


def low_rank_forward(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, s: float, drop: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """``(y [T, out], h [T, r])`` for flat ``x [T, in]``; every operand in ``x``'s dtype."""
    h = masked(x, drop) @ a.t()
    y = matmul_weight(x, weight, bias)
    y.addmm_(h, b.t(), alpha=s)
    return y, h


def low_rank_grads(
    dy: Tensor, x: Tensor | None, h: Tensor, b: Tensor, s: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(P [T, r], dA [r, in], dB [out, r])`` for ``dy [T, out]``; ``P = dY B`` serves both dA and dx.

    ``x`` is what A saw. Without it there is no dA: A is frozen.
    """
    p = dy @ b
    return p, None if x is None else (p.t() @ x).mul_(s), (dy.t() @ h).mul_(s)


def masked(x: Tensor, drop: Dropout | None) -> Tensor:
    """What A sees of ``x``."""
    return x if drop is None else drop.of(x)


def add_low_rank(dx: Tensor, p: Tensor, a: Tensor, s: float, drop: Dropout | None) -> Tensor:
    """``dX + D s P A`` in the place of ``dx [T, in]``."""
    return dx.addmm_(p, a, alpha=s) if drop is None else drop.add(dx, (p @ a).mul_(s))


def scale_rows(u: Tensor, less_one: Tensor | None, bias: Tensor | None) -> Tensor:
    """``g u + b [T, out]`` from ``less_one = g - 1`` in ``u``'s dtype; ``u`` becomes ``z = g u`` in place.

    Without a row scale it is ``u`` itself: the product has added the bias.
    """
    if less_one is None:
        return u
    u.addcmul_(u, less_one)
    return u if bias is None else u + bias


def row_scale_grads(
    dy: Tensor, z: Tensor | None, less_one: Tensor | None, *, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``(dY g [T, out], dg [out] float32)`` of ``y = z + b`` with ``z = g u``; without a row scale ``(dY, None)``.

    ``in_place`` writes the first over ``dy``, which must be the caller's own.
    """
    if less_one is None or z is None:
        return dy, None
    dtype = torch.promote_types(dy.dtype, torch.float32)
    g = less_one.to(dtype) + 1
    dg = (dy * z).sum(0).to(dtype).div_(g.masked_fill_(g == 0, torch.inf))
    return torch.addcmul(dy, dy, less_one, out=dy if in_place else None), dg


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        row_scale: Tensor | None,
        drop: Dropout | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = A.to(x.dtype), B.to(x.dtype)
        less_one = None if row_scale is None else (row_scale - 1).to(x.dtype)
        u, h = low_rank_forward(flat, weight, bias if less_one is None else None, a, b, scaling, drop)
        y = scale_rows(u, less_one, bias)
        kept_x, z = flat if ctx.needs_input_grad[3] else None, None if less_one is None else u
        ctx.save_for_backward(kept_x, h, a, b, less_one, z)
        ctx.weight, ctx.scaling, ctx.drop, ctx.dtypes = weight, scaling, drop, (A.dtype, B.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b, less_one, z = ctx.saved_tensors
        flat, dg = row_scale_grads(dy.reshape(-1, dy.shape[-1]), z, less_one)
        p, da, db = low_rank_grads(flat, None if x is None else masked(x, ctx.drop), h, b, ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = add_low_rank(matmul_grad(flat, ctx.weight), p, a, ctx.scaling, ctx.drop)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        da = None if da is None else da.to(ctx.dtypes[0])
        return dx, None, None, da, db.to(ctx.dtypes[1]), None, dg, None
