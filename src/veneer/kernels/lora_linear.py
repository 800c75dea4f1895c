"""A frozen linear with a low-rank update, as one differentiable operation.

``y = g (x W^T + s (D x A^T) B^T) + b``  (Hu et al. 2021, eq. 3; with a row scale g: Liu et al. 2024, eq. 5; with D, a
mask of dropout on what A sees, else 1)

The backward multiplies the small matrices first and never forms ``dW`` or ``B A``. With ``G = dY g``, one pass:

    P  = G B             [T, r]
    dA = s P^T D x       [r, in]
    dB = G^T h           [out, r]      with h = D x (s A)^T kept from the forward
    dx = G W + D P (s A) [T, in]
    dg = sum over T of dY z / g        with z = g (x W^T + h B^T) kept from the forward

``s A`` is rounded once from its master, so that the scaling costs no rounding of its own.

Kept for the backward: ``x`` once, in its own dtype, or what a norm made it from (neither where A is frozen), ``h``, and
with a row scale ``z``, which without a bias is the output itself (and computed again where that was written over); D is
made again. A row whose scale is exactly zero gets no gradient of it.
Names: ``T`` rows (all leading dimensions flattened), ``r`` rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels import native
from veneer.kernels.check import checked
from veneer.kernels.dropout import Dropout
from veneer.kernels.matmul import Plain, Turned, Weight, as_tensor, factor_grad, sum_of_products
from veneer.kernels.rms_norm import Kept, is_kept


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
    inner = bias if row_scale is None else None
    less_one = None if row_scale is None else (row_scale.detach() - 1).to(x.dtype)
    y: Tensor = _LoraLinear.apply(x, weight, inner, A, B, scaling, drop, Kept.of(x), less_one)  # type: ignore[no-untyped-call]  # torch's own
    if row_scale is not None:
        y = _RowScale.apply(y, row_scale, less_one)  # type: ignore[no-untyped-call]  # torch's own
        if y.requires_grad:
            y.grad_fn.version = y._version  # type: ignore[union-attr]  # its context: what it has kept is not changed
        if bias is None and y.requires_grad:
            return is_kept(unflattened(y, x))
        y = y if bias is None else y + bias
    return unflattened(y, x)


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """``y [T, out]`` in the leading dimensions of ``x [..., in]``.

    Done by autograd's own view and not inside of a function: what a function returns as a view, nobody may write to.
    """
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def whole_rank(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors with rows and columns of zeros up to a rank that is a multiple of 8, which change no result.

    In 16 bits, where products of other widths are slow or need code of their own: with as many ranks as EVA gives, the
    code for them took a tenth of a step on a CPU.
    """
    lacking = -len(A) % 8
    if not lacking or dtype.itemsize != 2:
        return A, B
    return F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking))


def scaled(A: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """``s A`` of the master, for products in a dtype."""
    return (A if s == 1 else A * s).to(dtype)


def low_rank_forward(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    sa: Tensor,
    b: Tensor,
    drop: Dropout | None = None,
    less_one: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [T, out], h [T, r])`` for flat ``x [T, in]`` and ``s A``; every operand in ``x``'s dtype.

    With ``less_one = g - 1`` it is ``z = g u``, before the bias.
    """
    h = sum_of_products(Turned(x, sa, drop))
    return projected(x, weight, bias, h, b, less_one), h


def projected(x: Tensor, weight: Weight, bias: Tensor | None, h: Tensor, b: Tensor, less_one: Tensor | None) -> Tensor:
    """``x W^T + h B^T + b``; with a row scale it is scaled, and before its bias."""
    parts = Turned(x, weight), Turned(h, b)
    return sum_of_products(*parts, bias=bias) if less_one is None else sum_of_products(*parts, less_one=less_one)


def low_rank_grads(
    dy: Tensor, x: Tensor | None, h: Tensor, b: Tensor, s: float, drop: Dropout | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(P [T, r], dA [r, in], dB [out, r])`` for ``dy [T, out]``; ``P = dY B`` serves both dA and dx.

    Without ``x`` there is no dA: A is frozen.
    """
    p = sum_of_products(Plain(dy, b))
    return p, None if x is None else factor_grad(p, x, drop).mul_(s), factor_grad(h, dy).t()


def row_scale_grads(
    dy: Tensor, z: Tensor | None, less_one: Tensor | None, *, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``(dY g [T, out], dg [out] float32)`` of ``y = z + b`` with ``z = g u``; without a row scale ``(dY, None)``.

    ``in_place`` writes the first over ``dy``, which must be the caller's own.
    """
    if less_one is None or z is None:
        return dy, None
    dtype = torch.promote_types(dy.dtype, torch.float32)
    if native.can_take(dy, z, less_one, function="scale_back"):
        out, sums = dy if in_place else torch.empty_like(dy), less_one.new_empty(len(less_one), dtype=dtype)
        native.call("scale_back", dy, z, less_one, out, sums, *dy.shape)
    else:
        sums = (dy * z).sum(0).to(dtype)
        out = torch.addcmul(dy, dy, less_one, out=dy if in_place else None)
    g = less_one.to(dtype) + 1
    return out, sums.div_(g.masked_fill_(g == 0, torch.inf))


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
        drop: Dropout | None,
        kept: Kept,
        less_one: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, h = low_rank_forward(flat, weight, bias, scaled(A, scaling, x.dtype), B.to(x.dtype), drop, less_one)
        kept_x = kept[:3] if ctx.needs_input_grad[3] else (None, None, None)
        ctx.save_for_backward(*kept_x, h, A, B)
        ctx.weight, ctx.scaling, ctx.drop, ctx.norm = weight, scaling, drop, kept[3:]
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, other, norm, h, A, B = ctx.__dict__.pop("unpacked", None) or ctx.saved_tensors
        x = None if rows is None else Kept(rows, other, norm, *ctx.norm).again()
        p, da, db = low_rank_grads(dy, x, h, B.to(dy.dtype), ctx.scaling, ctx.drop)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = sum_of_products(Plain(dy, ctx.weight), Plain(p, scaled(A, ctx.scaling, dy.dtype), ctx.drop))
            dx = dx.view(ctx.shape)
        da = None if da is None else da.to(A.dtype)
        return dx, None, None, da, db.to(B.dtype), None, None, None, None

    @staticmethod
    def again(ctx: Any) -> Tensor | None:
        """The output without a bias, just before the backward; None where x is not kept."""
        ctx.unpacked = ctx.saved_tensors  # under checkpointing they can be had once
        rows, other, norm, h, _, B = ctx.unpacked
        if rows is None:
            return None
        x = Kept(rows, other, norm, *ctx.norm).again()
        return sum_of_products(Turned(x, ctx.weight), Turned(h, B.to(x.dtype)))


class _RowScale(torch.autograd.Function):
    """What has been scaled by :class:`_LoraLinear` at once: ``z = g u [T, out]``, whose producer can compute u again.

    z is the layer's output where that has no bias, and others may write over it (Llama 4 adds its experts' sum to it).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, row_scale: Tensor, less_one: Tensor) -> Tensor:
        ctx.less_one = less_one
        ctx.mark_dirty(z)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *row_scale_grads(dy, _scaled_rows(ctx), ctx.less_one), None


def _scaled_rows(ctx: Any) -> Tensor:
    """``z``; where somebody has written over it, it is computed again."""
    error = None
    try:
        (z,) = ctx.saved_tensors
        if z._version == ctx.version:  # under checkpointing nobody else looks
            return z  # type: ignore[no-any-return]  # torch's contexts are untyped
    except RuntimeError as found:
        error = found
    producer = ctx.next_functions[0][0]
    u: Tensor | None = None if producer is None else producer._forward_cls.again(producer)
    if u is None:
        raise RuntimeError(
            "the output of an adapted layer with a row scale (DoRA) was changed in place, and the layer's input was "
            "not kept (LoRA-FA): change the output out of place"
        ) from error
    return u.addcmul_(u, ctx.less_one)
