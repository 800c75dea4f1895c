"""Root-mean-square normalisation with a frozen weight.

``y = x / sqrt(mean(x^2) + eps) * (w + offset)``  (Zhang and Sennrich 2019, eq. 4), statistics in float32. The offset is
0, or 1 in Gemma's models.

Kept for the backward: ``x`` in its own dtype and ``rstd [T, 1]`` in float32. No gradient of the weight is computed.

    g  = dy * (w + offset)
    dx = rstd * (g - xhat * mean(g * xhat))    with xhat = x * rstd

An operation that reads the output need not keep it: :class:`Kept` keeps ``x``, which is kept anyway, and computes the
output again, bit for bit. So it does with a sum of which another operation keeps a part (DoRA that of a projection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.check import checked


@dataclass(frozen=True)
class Norm:
    """A norm as the part of another operation."""

    weight: Tensor  # [width] frozen
    eps: float
    offset: float = 0.0


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The operation in plain PyTorch, as Llama's own code writes it: the cast back comes before the weight; or, with an
    offset, as Gemma's does: it comes last."""
    xf = x.float() if x.dtype != torch.float64 else x
    xhat = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    return (xhat * (weight.to(xhat.dtype) + offset)).to(x.dtype) if offset else weight * xhat.to(x.dtype)


@checked("RMSNorm", rms_norm_reference, "x")
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm over the last dimension: ``x [..., d]``, ``weight [d]`` frozen; returns ``[..., d]`` in ``x``'s dtype."""
    if weight.requires_grad:
        return rms_norm_reference(x, weight, eps, offset)
    result: Tensor = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]  # torch's own
    if result.requires_grad:
        result.__dict__[_ORIGIN] = Kept(x.detach(), None, weight, eps, offset), result._version
    return result


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The operation in plain PyTorch; the oracle of :func:`add_rms_norm`."""
    total = residual + x
    return total, rms_norm_reference(total, weight, eps, offset)


@checked("sum and RMSNorm", add_rms_norm_reference, "x", "residual")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """``residual + x`` and its RMSNorm, both ``[..., d]``, of ``x`` and ``residual`` ``[..., d]`` of one dtype.

    What is kept is the sum, or the two where another operation keeps ``x`` anyway (:func:`is_kept`): the sum is then
    computed again.
    """
    if weight.requires_grad:
        return add_rms_norm_reference(x, residual, weight, eps, offset)
    apart = _KEPT in x.__dict__
    total, y = _AddRmsNorm.apply(x, residual, weight, eps, offset, apart)  # type: ignore[no-untyped-call]  # torch's own
    if y.requires_grad:
        kept = Kept(residual.detach(), x.detach()) if apart else Kept(total.detach())
        y.__dict__[_ORIGIN] = kept._replace(weight=weight, eps=eps, offset=offset), y._version
    return total, y


_ORIGIN = "_veneer_normed"  # on an output: what computes it again, and the version that it had then
_KEPT = "_veneer_kept"  # on an output: an operation keeps it for its backward


def is_kept(x: Tensor) -> Tensor:
    """``x``, which an operation keeps for its backward, so that others may keep it at no cost."""
    x.__dict__[_KEPT] = True
    return x


class Kept(NamedTuple):
    """Rows that the backward of an operation needs: themselves or a sum, or what a norm made from them."""

    rows: Tensor
    other: Tensor | None = None  # the rows' second part
    weight: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0

    @classmethod
    def of(cls, x: Tensor) -> Kept:
        """What to keep for ``x [..., d]``."""
        origin, version = x.__dict__.get(_ORIGIN, (None, 0))
        return cls(x) if origin is None or x._version != version else origin

    def split(self, size: int) -> list[Kept]:
        """The same of parts of so many rows."""
        rows = torch.split(_flat(self.rows), size)
        others = [None] * len(rows) if self.other is None else torch.split(_flat(self.other), size)
        return [self._replace(rows=part, other=other) for part, other in zip(rows, others)]

    def again(self) -> Tensor:
        """``[T, d]``: the rows, flattened."""
        flat = _flat(self.rows)
        if self.other is not None:
            flat = flat + _flat(self.other)
        return flat if self.weight is None else normalised(flat, self.weight, self.eps, self.offset)[0]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def normalised(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The output ``[..., d]``, and ``rstd [..., 1]``; outside of autograd."""
    if native.can_take(x, weight, function="rms_norm"):
        out, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        native.call("rms_norm", x, None, None, weight, out, rstd, rstd.numel(), x.shape[-1], eps, float(offset))
        return out, rstd
    xf = _wide(x)
    # One pass for the squares: a norm per row instead of pow, mean and their temporaries.
    rstd = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y: Tensor = xf * rstd
    return (y.mul_(_wide(weight) + offset).to(x.dtype) if offset else y.to(x.dtype).mul_(weight)), rstd


def _sum_normalised(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    """The sum, its norm, and ``rstd``."""
    if not native.can_take(x, residual, weight, function="rms_norm"):
        total = residual + x
        return total, *normalised(total, weight, eps, offset)
    total, out, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    native.call("rms_norm", residual, x, total, weight, out, rstd, rstd.numel(), x.shape[-1], eps, float(offset))
    return total, out, rstd


def normalised_back(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    *,
    more: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """``dx`` of :func:`normalised`.

    Args:
        more: what is added to it.
        in_place: write it over ``dy``, which must be the caller's own.
    """
    if native.can_take(dy, x, weight, *(() if more is None else (more,)), function="rms_norm_back"):
        dx = dy if in_place else torch.empty_like(x)
        native.call("rms_norm_back", dy, x, weight, rstd, more, dx, rstd.numel(), x.shape[-1], float(offset))
        return dx
    g = _wide(dy) * (_wide(weight) + offset) if offset else _wide(dy * weight)
    xhat = _wide(x) * rstd
    mean = (g * xhat).mean(-1, keepdim=True)
    dx = xhat.mul_(-mean).add_(g).mul_(rstd).to(x.dtype)
    return dx if more is None else dx.add_(more)


def _wide(x: Tensor) -> Tensor:
    wide: Tensor = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, rstd = normalised(x, weight, eps, offset)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        return normalised_back(dy, x, rstd, weight, ctx.offset), None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, apart: bool
    ) -> tuple[Tensor, Tensor]:
        total, y, rstd = _sum_normalised(x, residual, weight, eps, offset)
        ctx.save_for_backward(*((residual, x) if apart else (total, None)), rstd, weight)
        ctx.offset = offset
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, other, rstd, weight = ctx.saved_tensors
        total = rows if other is None else rows + other
        dx = normalised_back(dy, total, rstd, weight, ctx.offset, more=dtotal)
        return dx, dx, None, None, None, None
