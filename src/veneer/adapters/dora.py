"""DoRA: the size of each row of the weight is trained apart from its direction (Liu et al. 2024, eq. 5 and sec. 4.3).

    y = g (W x + s B A x) + b        g = m / n        n[o] = || W[o] + s (B A)[o] ||, a constant to the gradient

The norm never builds ``W + s B A``. Row by row

    n^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B

where ``W A^T`` sends the r rows of A through the base, plain or in codes, and ``||W||^2`` never changes. It is computed
when a factor has changed: once per optimizer step, however many micro-batches see it, and not at all in evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.adapters.variant import Variant
from veneer.kernels.matmul import Weight

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

KEY = "lora_magnitude_vector"
_ROWS = 1 << 21  # numbers of a weight that are squared at a time


class Dora(Variant):
    """The magnitude ``m [out]`` of each row, which starts as the norm of the row."""

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        adapter.magnitude = nn.Parameter(row_norm(adapter, layer).clone())

    def row_scale(self, adapter: LoraAdapter, layer: LoraLinear) -> Tensor | None:
        assert adapter.magnitude is not None
        return adapter.magnitude / row_norm(adapter, layer)

    def tensors(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        return {} if adapter.magnitude is None else {KEY: adapter.magnitude}


@torch.no_grad()
def row_norm(adapter: LoraAdapter, layer: LoraLinear) -> Tensor:
    """``[out]`` float32: the norms of the rows of ``W + s B A``; the last one again while no factor has changed."""
    weight, square = layer.square_norm()
    key = (*((t.data_ptr(), t._version) for t in (adapter.A, adapter.B)), adapter.scaling, weight)
    if adapter.norm is None or adapter.norm[0] != key:
        adapter.norm = key, _row_norm(adapter, layer, square)
    return adapter.norm[1]


def _row_norm(adapter: LoraAdapter, layer: LoraLinear, square: Tensor) -> Tensor:
    A, B = adapter.factors()
    s = adapter.scaling
    images = layer.images(A.to(layer.weight.dtype)).to(A.dtype)  # [out, r]: W A^T
    inner = torch.addmm(images, B, A @ A.t(), beta=2 * s, alpha=s * s)
    square = square + inner.mul_(B).sum(1)
    # Rounding may leave a row of zeros a little below zero; a norm of zero would make its scale NaN.
    return square.clamp_(min=torch.finfo(square.dtype).tiny).sqrt_()


@torch.no_grad()
def square_norms(weight: Weight, transposed: bool) -> Tensor:
    """``[out]`` float32 (float64 of float64): the sum of squares of each row (of each column, if ``transposed``)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, Tensor):
        plain = weight.t() if transposed else weight
        step = max(1, _ROWS // plain.shape[1])
        return torch.cat([part.to(dtype).square().sum(1) for part in torch.split(plain, step)])
    return weight.dequantize().to(dtype).square().sum(1)
