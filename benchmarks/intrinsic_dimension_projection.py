"""A structured random projection from ``d`` numbers to ``D``: Fastfood (Le, Sarlós and Smola 2013), never dense.

    P = [V_1; V_2; ...],    V_i = H G_i Q_i H B_i / sqrt(L d)

``H`` is the Hadamard matrix of the smallest power of two ``L >= d``, ``B_i`` random signs, ``Q_i`` a random order and
``G_i`` normal numbers; ``d`` is padded to ``L`` by zeros, and what stands over ``D`` in the last block is dropped. Each
row has a norm of about one whatever ``d`` is, so that a step of Adam moves the ``D`` numbers by about its rate.

Memory is of the order of ``D``, time of ``D log d``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Fastfood:
    """``P [D, d]`` of a seed.

    Args:
        dimension: ``d``.
        size: ``D``.
        seed: the same seed gives the same projection.

    Raises:
        ValueError: a dimension below one, or above the size.
    """

    def __init__(self, dimension: int, size: int, seed: int) -> None:
        if not 1 <= dimension <= size:
            raise ValueError(f"a subspace of {size} numbers has 1 to {size} dimensions, not {dimension}")
        self.dimension, self.size = dimension, size
        generator = torch.Generator().manual_seed(seed)
        self._width = 1 << (dimension - 1).bit_length()
        shape = (-(-size // self._width), self._width)
        self._signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        self._order = torch.rand(shape, generator=generator).argsort(1)
        self._gains = torch.randn(shape, generator=generator)
        self._scale = 1.0 / math.sqrt(self._width * dimension)

    def __call__(self, theta: Tensor) -> Tensor:
        """``P theta``: ``[d]`` to ``[D]``, float32."""
        padded = torch.nn.functional.pad(theta, (0, self._width - self.dimension))
        x = hadamard(self._signs * padded)
        x = hadamard(self._gains * x.gather(1, self._order))
        return x.reshape(-1)[: self.size] * self._scale

    def adjoint(self, flat: Tensor) -> Tensor:
        """``P^T flat``: ``[D]`` to ``[d]``, float32; what the gradient of the ``D`` numbers is in the subspace."""
        padded = torch.nn.functional.pad(flat, (0, self._signs.numel() - self.size)).view(self._signs.shape)
        x = self._gains * hadamard(padded)
        x = hadamard(torch.zeros_like(x).scatter_(1, self._order, x))
        return (self._signs * x).sum(0)[: self.dimension] * self._scale


def hadamard(x: Tensor) -> Tensor:
    """``x H`` of each row: ``[n, L]`` to ``[n, L]``, ``L`` a power of two, without normalisation (H H = L)."""
    rows, width = x.shape
    half = 1
    while half < width:
        pairs = x.view(rows, width // (2 * half), 2, half)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(rows, width)
        half *= 2
    return x
