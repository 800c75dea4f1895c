"""What lies between the products of a step on a GPU: the functions of ``cpp/rows.cpp``, in Triton.

Each takes what the function of its name takes there, reads every number once or twice, computes in float32 and rounds
where PyTorch's separate operations would have rounded. The formulas are in the ``.py`` file of the operation. Where a
product is rounded by itself, no multiply-add may be fused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # not on every machine
import triton.language as tl
from torch import Tensor

WORDS = 8192  # logits that a program has in flight; a row goes by in pieces of these
FLAT = 2048  # elements of a program where elements stand for themselves


def _launch(kernel: Any, grid: tuple[int, ...], device: int, *arguments: Any, **options: Any) -> None:
    if all(grid):
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


def _warps(width: int) -> int:
    """Of a program that holds a row: 16 elements a thread at most, if a program may be that large."""
    return max(1, min(16, int(triton.next_power_of_2(width)) // 512))


def rms_norm(
    x: Tensor,
    more: Tensor | None,
    total: Tensor | None,
    w: Tensor,
    y: Tensor,
    rstd: Tensor,
    rows: int,
    width: int,
    eps: float,
    offset: float,
) -> None:
    given = (x, x if more is None else more, y if total is None else total, w, y, rstd, width, eps, offset)
    options = {"SIZE": triton.next_power_of_2(width), "PLAIN": offset == 0.0, "MORE": more is not None}
    _launch(_rms_norm, (rows,), x.get_device(), *given, **options, num_warps=_warps(width))


def rms_norm_back(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    rstd: Tensor,
    dmore: Tensor | None,
    dx: Tensor,
    rows: int,
    width: int,
    offset: float,
) -> None:
    given = (dy, x, w, rstd, dy if dmore is None else dmore, dx, width, offset)
    options = {"SIZE": triton.next_power_of_2(width), "MORE": dmore is not None}
    _launch(_rms_norm_back, (rows,), x.get_device(), *given, **options, num_warps=_warps(width))


def cross_entropy(
    z: Tensor, labels: Tensor, nll: Tensor, correct: Tensor, rows: int, width: int, scale: float, grad: int
) -> None:
    arguments = (z, labels, nll, correct.view(torch.uint8), width, scale)
    options = {"GRAD": bool(grad), "WORDS": WORDS, "PIECES": triton.cdiv(width, WORDS), "num_warps": 16}
    _launch(_cross_entropy, (rows,), z.get_device(), *arguments, **options)


def turn(
    source: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rows: int,
    size: int,
    in_head: int,
    in_row: int,
    out_head: int,
    out_row: int,
    sign: float,
) -> None:
    half = size // 2
    arguments = (source, out, cos, sin, heads, half, in_head, in_row, out_head, out_row, sign)
    options = {"HALF": triton.next_power_of_2(half), "HEADS": 4, "enable_fp_fusion": False}
    _launch(_turn, (rows, triton.cdiv(heads, 4)), source.get_device(), *arguments, **options)


def _gate(
    act: str, e: Tensor, g: Tensor, m: Tensor, dg: Tensor | None, again: Tensor | None, count: int, back: int
) -> None:
    arguments = (e, g, m, m if dg is None else dg, m if again is None else again, count)
    options = {"ACT": act, "BACK": bool(back), "FLAT": FLAT, "enable_fp_fusion": False}
    _launch(_gate_kernel, (triton.cdiv(count, FLAT),), e.get_device(), *arguments, **options)


gate_silu, gate_gelu_tanh = functools.partial(_gate, "silu"), functools.partial(_gate, "gelu_tanh")


def drop(x: Tensor, out: Tensor, count: int, key: int, threshold: int, scale: float, add: int, begin: int) -> None:
    arguments = (x, out, count, key & 0xFFFFFFFF, key >> 32, threshold, scale, begin)
    options = {"ADD": bool(add), "FLAT": FLAT, "enable_fp_fusion": False}
    _launch(_drop, (triton.cdiv(count, FLAT),), x.get_device(), *arguments, **options)


@triton.jit  # type: ignore  # no types
def _rms_norm(
    x: tl.tensor,
    more: tl.tensor,
    total: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    width: int,
    eps: float,
    offset: float,
    SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
    MORE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < width
    kind = y.dtype.element_ty
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        value += tl.load(more + row * width + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(kind).to(tl.float32)
        tl.store(total + row * width + at, value.to(kind), mask=inside)
    r = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    tl.store(rstd + row, r)
    normed = value * r
    if PLAIN:
        normed = normed.to(kind).to(tl.float32)
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + row * width + at, (normed * weight).to(kind), mask=inside)


@triton.jit  # type: ignore  # no types
def _rms_norm_back(
    dy: tl.tensor,
    x: tl.tensor,
    w: tl.tensor,
    rstd: tl.tensor,
    dmore: tl.tensor,
    dx: tl.tensor,
    width: int,
    offset: float,
    SIZE: tl.constexpr,
    MORE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < width
    r = tl.load(rstd + row)
    xhat = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * r
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + row * width + at, mask=inside, other=0.0).to(tl.float32) * weight
    mean = tl.sum(g * xhat) / width
    value = r * (g - xhat * mean)
    if MORE:
        value += tl.load(dmore + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * width + at, value.to(dx.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore  # no types
def _cross_entropy(
    z: tl.tensor,
    labels: tl.tensor,
    nll: tl.tensor,
    correct: tl.tensor,
    width: int,
    scale: float,
    GRAD: tl.constexpr,
    WORDS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    z += row * width
    label = tl.load(labels + row)
    first = tl.arange(0, WORDS)
    # Every lane keeps the largest of its own words and the sum of their exponentials over it.
    top = tl.full([WORDS], float("-inf"), tl.float32)
    total = tl.zeros([WORDS], tl.float32)
    for piece in range(PIECES):
        at = piece * WORDS + first
        value = scale * tl.load(z + at, mask=at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        seen = higher > float("-inf")
        total = tl.where(seen, total * tl.exp(top - higher) + tl.exp(value - higher), total)
        top = higher
    most = tl.max(top)
    total = tl.sum(tl.where(top > float("-inf"), total * tl.exp(top - most), 0.0))
    own = scale * tl.load(z + label).to(tl.float32)
    tl.store(nll + row, tl.log(total) + (most - own))
    earlier = 0  # words before the label that are as likely: the first of them is the choice
    if own == most:
        for piece in range(PIECES):
            at = piece * WORDS + first
            value = scale * tl.load(z + at, mask=at < label, other=float("-inf")).to(tl.float32)
            earlier += tl.sum(((value == most) & (at < label)).to(tl.int32))
    tl.store(correct + row, ((own == most) & (earlier == 0)).to(tl.uint8))
    if GRAD:
        for piece in range(PIECES):
            at = piece * WORDS + first
            value = scale * tl.load(z + at, mask=at < width, other=float("-inf")).to(tl.float32)
            share = tl.exp(value - most) / total - tl.where(at == label, 1.0, 0.0)
            tl.store(z + at, (scale * share).to(z.dtype.element_ty), mask=at < width)


@triton.jit  # type: ignore  # no types
def _turn(
    source: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    heads: int,
    half: int,
    in_head: int,
    in_row: int,
    out_head: int,
    out_row: int,
    sign: float,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    at = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    here = at < half
    kind = out.dtype.element_ty
    c1 = tl.load(cos + row * 2 * half + at, mask=here, other=0.0).to(tl.float32)
    c2 = tl.load(cos + row * 2 * half + half + at, mask=here, other=0.0).to(tl.float32)
    s = sign * tl.load(sin + row * 2 * half + at, mask=here, other=0.0).to(tl.float32)
    source += head * in_head + row * in_row + at
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    first = (a * c1).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
    second = (b * c2).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)
    out += head * out_head + row * out_row + at
    tl.store(out, first.to(kind), mask=inside)
    tl.store(out + half, second.to(kind), mask=inside)


@triton.jit  # type: ignore  # no types
def _gate_kernel(
    e: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    dg: tl.tensor,
    again: tl.tensor,
    count: int,
    ACT: tl.constexpr,
    BACK: tl.constexpr,
    FLAT: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * FLAT + tl.arange(0, FLAT)
    inside = place < count
    kind = m.dtype.element_ty
    x = tl.load(e + place, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    else:
        t = 1.0 - 2.0 / (1.0 + tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)))
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.3989422804014327 * x * (1.0 - t * t) * (1.0 + 0.134145 * x * x)
    value = value.to(kind).to(tl.float32)
    if BACK:
        dm = tl.load(m + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dg + place, (value * dm).to(kind), mask=inside)
        tl.store(again + place, (value * gain).to(kind), mask=inside)
        tl.store(m + place, ((dm * gain).to(kind).to(tl.float32) * slope).to(kind), mask=inside)
    else:
        tl.store(m + place, (value * gain).to(kind), mask=inside)


@triton.jit(do_not_specialize=["low", "high", "threshold", "begin"])  # type: ignore  # no types
def _drop(
    x: tl.tensor,
    out: tl.tensor,
    count: int,
    low: tl.tensor,
    high: tl.tensor,
    threshold: tl.tensor,
    scale: float,
    begin: tl.tensor,
    ADD: tl.constexpr,
    FLAT: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * FLAT + tl.arange(0, FLAT)
    inside = place < count
    number = place + begin
    counter = number >> 1
    h = counter.to(tl.uint32) ^ low.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h ^= (counter >> 32).to(tl.uint32) * 0x9E3779B9 + high.to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x846CA68B
    h ^= h >> 16
    stays = tl.where((number & 1) == 0, h & 0xFFFF, h >> 16) >= threshold.to(tl.uint32)
    kind = out.dtype.element_ty
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(stays, (value * scale).to(kind).to(tl.float32), 0.0)
    if ADD:
        value += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(kind), mask=inside)
