"""Dropout whose mask is computed from a counter, so that the backward makes it again instead of keeping it.

``y_i = x_i m_i / (1 - p)``, where ``m_i`` is 1 if 16 bits of a hash are at least ``p 2^16``, and else 0, for p in steps
of 2^-16 (Srivastava et al. 2014). Elements ``n`` and ``n + 256`` of every 512 have the halves of one hash, that of the
seed and of a counter (two rounds of a 32-bit mixer by multiplication, Wellons 2018). The same mask on every device, in
every dtype and with any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.kernels import native

_BITS = 2**32 - 1


@dataclass(frozen=True)
class Dropout:
    """One draw of a mask.

    Attributes:
        p: the probability of zero, from 0 to below 1.
        seed: from 0 to below 2^63.
        row: of the first row that it is applied to, in the rows that the mask is of.
    """

    p: float
    seed: int
    row: int = 0

    @classmethod
    def drawn(cls, p: float) -> Dropout | None:
        """A new draw, from torch's own generator; None where nothing is dropped."""
        return cls(p, int(torch.randint(2**62, (1,)))) if p else None

    def after(self, rows: int) -> Dropout:
        """The same draw where so many rows have gone before."""
        return replace(self, row=self.row + rows)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` with the mask over its elements; differentiable."""
        result: Tensor = _Apply.apply(x, self)  # type: ignore[no-untyped-call]  # torch's own
        return result

    def of(self, x: Tensor) -> Tensor:
        """The same, outside of autograd."""
        return self._into(x, torch.empty_like(x), add=False)

    def add(self, total: Tensor, x: Tensor) -> Tensor:
        """``total + mask(x)`` in the place of ``total``; outside of autograd."""
        return self._into(x, total, add=True)

    def mask(self, count: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
        """``[count]`` bool: what stays of the elements from ``first`` on."""
        i = torch.arange(first, first + count, device=device)
        h = (i // 512) * 256 + i % 256
        h = _mixed((h & _BITS) ^ (self.seed & _BITS) ^ (h >> 32))
        h = _mixed((h + (self.seed >> 32)) & _BITS)
        return torch.where(i % 512 < 256, h & 0xFFFF, h >> 16) >= self._threshold

    @property
    def _threshold(self) -> int:
        return min(round(self.p * 2**16), 2**16 - 1)

    def _into(self, x: Tensor, out: Tensor, add: bool) -> Tensor:
        scale, first = 1 / (1 - self._threshold / 2**16), self.row * x.shape[-1]
        if native.can_take(x, out, function="drop"):
            native.call("drop", x, out, x.numel(), self.seed, self._threshold, scale, int(add), first)
            return out
        dropped = torch.where(self.mask(x.numel(), x.device, first).view(x.shape), x * scale, 0)
        return out.add_(dropped) if add else out.copy_(dropped)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, drop: Dropout) -> Tensor:
        ctx.drop = drop  # type: ignore[attr-defined]  # torch's context takes anything
        return drop.of(x.contiguous())

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.drop.of(dy.contiguous()), None  # type: ignore[attr-defined]  # as above


def _mixed(h: Tensor) -> Tensor:
    """A bijection of 32 bits."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _BITS
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _BITS
    return h ^ (h >> 16)
