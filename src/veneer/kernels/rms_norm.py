"""Root-mean-square normalisation with a frozen weight.

``y = x / sqrt(mean(x^2) + eps) * w``  (Zhang and Sennrich 2019, eq. 4), statistics in float32.

Kept for the backward: ``x`` in its own dtype and ``rstd [T, 1]`` in float32. No gradient of the weight is computed.

    g  = dy * w
    dx = rstd * (g - xhat * mean(g * xhat))    with xhat = x * rstd

An operation that reads the output need not keep it: :class:`Kept` keeps ``x``, which is kept anyway, and computes the
output again, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.check import checked


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The operation in plain PyTorch, as Llama's own code writes it: the cast back comes before the weight."""
    xf = x.float() if x.dtype != torch.float64 else x
    xhat = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    return weight * xhat.to(x.dtype)


@checked("RMSNorm", rms_norm_reference, "x")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: ``x [..., d]``, ``weight [d]`` frozen; returns ``[..., d]`` in ``x``'s dtype."""
    if weight.requires_grad:
        return rms_norm_reference(x, weight, eps)
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch's own
    if result.requires_grad:
        result.__dict__[_ORIGIN] = Kept(x.detach(), weight, eps), result._version
    return result


_ORIGIN = "_veneer_normed"  # on an output: what computes it again, and the version that it had then


class Kept(NamedTuple):
    """Rows that the backward of an operation needs: themselves, or what a norm made them from."""

    rows: Tensor
    weight: Tensor | None = None
    eps: float = 0.0

    @classmethod
    def of(cls, x: Tensor) -> Kept:
        """What to keep for ``x [..., d]``."""
        origin, version = x.__dict__.get(_ORIGIN, (None, 0))
        return cls(x) if origin is None or x._version != version else origin

    def split(self, size: int) -> list[Kept]:
        """The same of parts of so many rows."""
        return [
            Kept(part, self.weight, self.eps) for part in torch.split(self.rows.reshape(-1, self.rows.shape[-1]), size)
        ]

    def again(self) -> Tensor:
        """``[T, d]``: the rows, flattened."""
        flat = self.rows.reshape(-1, self.rows.shape[-1])
        return flat if self.weight is None else _forward(flat, self.weight, self.eps)[0]


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, and ``rstd``."""
    if native.can_take(x, weight):
        out, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        native.call("rms_norm", x, weight, out, rstd, rstd.numel(), x.shape[-1], eps)
        return out, rstd
    xf = _wide(x)
    # One pass for the squares: a norm per row instead of pow, mean and their temporaries.
    rstd = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y: Tensor = (xf * rstd).to(x.dtype)
    return y.mul_(weight), rstd


def _wide(x: Tensor) -> Tensor:
    wide: Tensor = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        if native.can_take(dy, x, weight):
            dx = torch.empty_like(x)
            native.call("rms_norm_back", dy, x, weight, rstd, dx, rstd.numel(), x.shape[-1])
            return dx, None, None
        g = _wide(dy * weight)
        xhat = _wide(x) * rstd
        mean = (g * xhat).mean(-1, keepdim=True)
        return xhat.mul_(-mean).add_(g).mul_(rstd).to(x.dtype), None, None
