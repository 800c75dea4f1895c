"""The norms of the rows of ``W + s B A``, for DoRA, without that matrix. Row by row

    n^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B

where ``W A^T`` sends the r rows of A through the base, plain or in codes, and ``||W||^2`` never changes. It is computed
when a factor has changed: once per optimizer step, however many micro-batches see it, and not at all in evaluation.

Whether one has changed is not told by version counters alone: fused optimizers and writes through ``.data`` leave them
as they are. So steps of torch's optimizers count too, and:

- On the CPU two products with a fixed vector tell the factors as they were from the factors as they are (a hundredth
  of the work of the norm and less).
- On other devices reading such a result would make the host wait. There the norm is computed again after a backward,
  unless the loop that runs raises the version of what it writes (:func:`writes_are_counted`; Veneer's own does). Who
  writes through ``.data`` between two evaluations calls ``torch.autograd.graph.increment_version``, as torch asks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from veneer.kernels.matmul import Weight

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear

_ROWS = 1 << 21  # numbers of a weight that are squared at a time


@dataclass
class _Signs:
    """What else than a version tells that factors may have been written."""

    steps: int = 0  # of all optimizers of torch's
    counted: bool = False  # whoever writes now raises the versions


_signs = _Signs()


def _count_step(*_: Any) -> None:
    _signs.steps += 1


register_optimizer_step_post_hook(_count_step)


@contextlib.contextmanager
def writes_are_counted() -> Iterator[None]:
    """Within it whoever writes a factor raises its version, so that no norm is computed for fear of a silent write."""
    before, _signs.counted = _signs.counted, True
    try:
        yield
    finally:
        _signs.counted = before


@dataclass(frozen=True)
class _Seen:
    """What a norm was computed from."""

    key: tuple[object, ...]
    marks: Tensor | None  # None where it is not read


def row_norm(adapter: LoraAdapter, layer: LoraLinear) -> Tensor:
    """``[out]`` float32: the norms of the rows of ``W + s B A``; the last one again while no factor has changed.

    In float32 under autocast too, and fit for the backward also where it is first computed in inference mode.
    """
    A, B = adapter.A, adapter.B
    with _plain_numbers(A.device):
        weight, square = layer.square_norm()
        versions = ((t.data_ptr(), t._version) for t in (A, B))
        key = (*versions, adapter.scaling, layer.training, _signs.steps, weight)
        marks = _marks(A.detach(), B.detach()) if _is_read_at_once(A.device) else None
        if adapter.norm is not None:
            seen, norm = adapter.norm
            assert isinstance(seen, _Seen)
            if seen.key == key and (marks is None or seen.marks is None or torch.equal(marks, seen.marks)):
                return norm
        adapter.norm = _Seen(key, marks), _row_norm(adapter, layer, square)
        return adapter.norm[1]


@contextlib.contextmanager
def _plain_numbers(device: torch.device) -> Iterator[None]:
    """Nothing is cast on the way, and what is made may be kept for a backward."""
    is_cast = device.type != "meta" and torch.is_autocast_enabled(device.type)  # torch has no autocast for meta
    cast = torch.autocast(device.type, enabled=False) if is_cast else contextlib.nullcontext()
    with cast, torch.inference_mode(False), torch.no_grad():  # the second would turn gradients on
        yield


def _is_read_at_once(device: torch.device) -> bool:
    return device.type == "cpu"


def _marks(A: Tensor, B: Tensor) -> Tensor:
    """``[2 r]``: each row of A and each column of B times a fixed random vector."""
    return torch.cat((A @ _probe(A.shape[1], A.dtype), _probe(B.shape[0], B.dtype) @ B))


@functools.lru_cache(maxsize=256)
def _probe(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def forget_after_backward(adapter: LoraAdapter, scale: Tensor) -> None:
    """Where a silent write would not be seen, the norm is forgotten when a backward comes to ``scale``: an optimizer
    that nobody knows of may write next."""
    if scale.requires_grad and not _is_read_at_once(scale.device) and not _signs.counted:
        scale.register_hook(functools.partial(_forget, adapter))  # type: ignore[no-untyped-call]  # torch's own


def _forget(adapter: LoraAdapter, _: Tensor) -> None:
    adapter.norm = None


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
