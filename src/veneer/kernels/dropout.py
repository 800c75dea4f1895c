"""Dropout whose mask is computed from a counter, so that the backward makes it again instead of keeping it.

``y_i = x_i m_i / (1 - p)``, where ``m_i`` is 1 if 16 bits of a hash are at least ``p 2^16``, and else 0, for p in steps
of 2^-16 (Srivastava et al. 2014). Elements ``2n`` and ``2n + 1`` have the lower and the upper half of the hash of n: a
32-bit mixer by multiplication (Wellons 2018) with one key before it and one in its midst, both mixed from the seed. The
same mask on every device, in every dtype and with any number of threads.
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
        i, key = torch.arange(first, first + count, device=device), self._key
        counter = i // 2
        h = (counter ^ key) & _BITS
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & _BITS
        h = h ^ (((counter >> 32) * 0x9E3779B9 + (key >> 32)) & _BITS)
        h = ((h ^ (h >> 15)) * 0x846CA68B) & _BITS
        h = h ^ (h >> 16)
        return torch.where(i % 2 == 0, h & 0xFFFF, h >> 16) >= self._threshold

    @property
    def _key(self) -> int:
        """63 bits that have nothing in common for seeds that are close to each other (Steele et al. 2014)."""
        k = (self.seed + 0x9E3779B97F4A7C15) % 2**64
        k = ((k ^ (k >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        k = ((k ^ (k >> 27)) * 0x94D049BB133111EB) % 2**64
        return (k ^ (k >> 31)) >> 1

    @property
    def _threshold(self) -> int:
        return min(round(self.p * 2**16), 2**16 - 1)

    def arguments(self, width: int) -> tuple[int, int, int, float]:
        """``key, threshold, begin, scale`` as native code wants them, for rows of this width."""
        return self._key, self._threshold, self.row * width, 1 / (1 - self._threshold / 2**16)

    def is_even(self, rows: int, width: int) -> bool:
        """Whether rows begin with whole hashes, and their counters have one upper half: code by blocks wants that."""
        begin, end = self.row * width, (self.row + rows) * width
        return width % 2 == 0 and begin >> 33 == end >> 33

    def _into(self, x: Tensor, out: Tensor, add: bool) -> Tensor:
        key, threshold, first, scale = self.arguments(x.shape[-1])
        if native.can_take(x, out, function="drop"):
            native.call("drop", x, out, x.numel(), key, threshold, scale, int(add), first)
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
