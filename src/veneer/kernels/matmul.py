"""Products with a frozen weight and with low-rank factors, summed up before they are rounded.

    y = sum over i of A_i W_i^T (or A_i W_i) + b        dF = P^T X, for a narrow P

A weight and its low-rank update go into one sum, as do the gradients of linears that read the same rows. In native code
every element is summed in float32 and rounded once. PyTorch's way begins with the last product, the narrow one, and
rounds each time that another is added: the small summand is there before the large ones are rounded, and not lost.
Names: ``T`` rows, ``r`` rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels import native
from veneer.kernels.dropout import Dropout

_MOST = 8  # products of one sum in native code
_LEAST_ROWS = 32  # with fewer, laying out the weight costs more than it saves
_DECODED_BYTES = 1 << 21  # a weight in codes of up to so many is decoded whole; a larger one multiplies tile by tile


class FrozenMatrix(Protocol):
    """What the fused operations need of a frozen ``[out, in]`` weight that is not a plain tensor."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the dtype of :meth:`dequantize` and of both products."""

    @property
    def device(self) -> torch.device: ...

    @property
    def requires_grad(self) -> bool:
        """Always False."""

    def linear(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """``x [T, in]`` to ``x W^T + b [T, out]``, or added to ``onto`` in place."""

    def grad_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """``dy [T, out]`` to ``dY W [T, in]``, or added to ``onto`` in place."""

    def dequantize(self) -> Tensor:
        """``[out, in]``, the weight that both products compute with."""


Weight: TypeAlias = Tensor | FrozenMatrix


def as_tensor(weight: Weight) -> Tensor:
    """The weight as a plain tensor: itself, or what its codes stand for."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


class Turned(NamedTuple):
    """``A W^T`` of rows ``A [T, k]`` with ``W [n, k]``."""

    rows: Tensor
    weight: Weight
    drop: Dropout | None = None  # on the rows; in the only product of a sum


class Plain(NamedTuple):
    """``A W`` of rows ``A [T, k]`` with ``W [k, n]``."""

    rows: Tensor
    weight: Weight
    drop: Dropout | None = None  # on what it comes to, which is rounded before; in the last product of several


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "w")),
        *((name, ctypes.c_int64) for name in ("a_row", "w_row", "depth", "turned")),
    )


class _Drop(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in ("key", "threshold", "begin")), ("scale", ctypes.c_float))


class _Sum(ctypes.Structure):
    _fields_ = (
        ("products", _Product * _MOST),
        *((name, ctypes.c_int64) for name in ("count", "rows", "columns", "out_row")),
        *((name, ctypes.c_void_p) for name in ("bias", "less_one", "out")),
        ("dropped", ctypes.c_int64),
        ("drop", _Drop),
    )


def sum_of_products(
    *parts: Turned | Plain, bias: Tensor | None = None, less_one: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The sum of the products, ``[T, n]``; outside of autograd.

    Args:
        bias: ``[n]``, added to it; the products are then turned ones.
        less_one: ``[n]``, a scale for each column less one, which multiplies the rounded sum; without a bias.
        out: ``[T, n]`` to write it to, which none of the operands lies in; its rows may lie apart.
    """
    assert bias is None or less_one is None
    if len(parts) > 1:
        parts = tuple(part for part in parts if part.rows.shape[1]) or parts[:1]  # an update may have no rank
    if (plain := _for_native(parts, less_one if bias is None else bias)) is not None:
        return _native_sum(plain, bias, less_one, out)
    if less_one is not None:
        y = sum_of_products(*parts, out=out)
        return y.addcmul_(y, less_one)
    if (drop := parts[-1].drop) is not None:
        *others, last = parts
        if isinstance(last, Turned):
            return sum_of_products(Turned(drop.of(last.rows), last.weight), bias=bias, out=out)
        return drop.add(sum_of_products(*others, bias=bias, out=out), sum_of_products(Plain(last.rows, last.weight)))
    # The last product is the narrow one of an update: the wide ones are added to it before they are rounded.
    y = _product(parts[-1], bias if len(parts) == 1 else None, out)
    if bias is not None and len(parts) > 1:
        y += bias
    for part in reversed(parts[:-1]):
        rows, weight, _ = part
        turned = isinstance(part, Turned)
        if isinstance(weight, Tensor):
            y.addmm_(rows, weight.t() if turned else weight)
        else:
            (weight.linear if turned else weight.grad_input)(rows, onto=y)
    return y if out is None or out is y else out.copy_(y)


def _product(part: Turned | Plain, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """PyTorch's, perhaps in ``out``."""
    rows, weight, _ = part
    if isinstance(part, Turned):
        return F.linear(rows, weight, bias) if isinstance(weight, Tensor) else weight.linear(rows, bias)
    if isinstance(weight, Tensor):
        return torch.mm(rows, weight, out=out if out is not None and out.is_contiguous() else None)
    return weight.grad_input(rows)


def factor_grad(p: Tensor, x: Tensor, drop: Dropout | None = None) -> Tensor:
    """``P^T D X [r, n]`` of ``P [T, r]`` and ``X [T, n]``, in float32 or in their dtype; outside of autograd."""
    function = "outer"
    if drop is not None:
        function = "outer_dropped"
        if not drop.is_even(*x.shape) or not native.can_take(x[:0], function=function):
            return factor_grad(p, drop.of(x))
    if p.numel() and _are_rows(p, x) and native.can_take(p[:0], x[:0], function=function):
        out = x.new_empty(p.shape[1], x.shape[1], dtype=torch.float32)
        mask = () if drop is None else drop.arguments(x.shape[1])
        native.call(function, p, p.stride(0), x, x.stride(0), out, len(x), *out.shape, *mask)
        return out
    return p.t() @ (x if drop is None else drop.of(x))


def _for_native(parts: tuple[Turned | Plain, ...], vector: Tensor | None) -> list[Turned | Plain] | None:
    """The products as native code takes them, small weights in codes decoded; None where it does not take them."""
    first = parts[0].rows
    if len(parts) > _MOST or len(first) < _LEAST_ROWS or not all(part.weight.shape.numel() for part in parts):
        return None
    last = parts[-1]
    function = "matmul" if last.drop is None else "matmul_dropped"
    if last.drop is not None and not last.drop.is_even(len(first), _dropped_width(last)):
        return None
    if not native.can_take(first[:0], *(() if vector is None else (vector,)), function=function):
        return None
    found = []
    for part in parts:
        weight = part.weight
        if not isinstance(weight, Tensor) and weight.shape.numel() * weight.dtype.itemsize <= _DECODED_BYTES:
            weight = weight.dequantize()
        if not _are_rows(part.rows, weight) or part.rows.shape[1] % 2:
            return None
        found.append(part._replace(weight=weight))
    return found


def _are_rows(first: Tensor, second: Weight) -> bool:
    """Whether they are plain matrices of one dtype whose rows lie in one piece each."""
    if not isinstance(second, Tensor) or type(second) not in (Tensor, nn.Parameter):
        return False
    alike = first.dtype == second.dtype and first.device == second.device
    return alike and all(t.ndim == 2 and (t.stride(1) == 1 or t.shape[1] == 1) for t in (first, second))


def _native_sum(
    parts: Sequence[Turned | Plain], bias: Tensor | None, less_one: Tensor | None, out: Tensor | None
) -> Tensor:
    last = parts[-1]
    if out is None:
        out = last.rows.new_empty(len(last.rows), last.weight.shape[0 if isinstance(last, Turned) else 1])
    said = _Sum(count=len(parts), rows=out.shape[0], columns=out.shape[1], out_row=out.stride(0), out=out.data_ptr())
    said.bias, said.less_one = (None if vector is None else vector.data_ptr() for vector in (bias, less_one))
    if last.drop is not None:
        said.dropped = 1 if isinstance(last, Turned) else 2
        said.drop = _Drop(*last.drop.arguments(_dropped_width(last)))
    for place, (rows, weight, _) in enumerate(parts):
        assert isinstance(weight, Tensor)  # _for_native has seen to it
        pointers = rows.data_ptr(), weight.data_ptr(), rows.stride(0), weight.stride(0)
        said.products[place] = _Product(*pointers, rows.shape[1], isinstance(parts[place], Turned))
    native.call_struct("matmul" if last.drop is None else "matmul_dropped", out.dtype, said)
    return out


def _dropped_width(part: Turned | Plain) -> int:
    """Of the rows that its mask is over."""
    return part.rows.shape[1] if isinstance(part, Turned) else part.weight.shape[1]
