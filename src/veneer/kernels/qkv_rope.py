"""The three projections of attention, each with its low-rank update, and the rotation of queries and keys, as one.

    q = R(x W_q^T + s x A_q^T B_q^T + b_q),  k likewise,  v without R    (Su et al. 2021, eq. 34; Hu et al. 2021, eq. 3)

where ``R`` turns each pair of halves of a head: ``(u1, u2) -> (u1 c - u2 s, u2 c + u1 s)``. Some models have an RMSNorm
before R, of each head (Qwen 3, Gemma 3) or of all heads of a token together (OLMo 2). The rows of the three ``A`` are
stacked, so that x is read once; the rotation writes heads first, as attention reads them, with no copy in between.

Kept for the backward: ``x`` once, or what a norm made it from (neither where every A is frozen), the rank-r rows, and
what queries and keys were before their norm. A row scale needs each projection before its bias: where there is neither
bias nor norm, that is the output turned back, and attention keeps the output anyway.
Names: ``T`` rows, ``d`` width, ``H`` query heads, ``K`` key heads, ``D`` size of a head, ``r`` rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import native
from veneer.kernels.check import checked
from veneer.kernels.dropout import Dropout
from veneer.kernels.gated_mlp import LowRankLinear
from veneer.kernels.lora_linear import (
    lora_linear_reference,
    projected,
    row_scale_grads,
    scaled,
)
from veneer.kernels.matmul import Plain, Turned, factor_grad, sum_of_products
from veneer.kernels.rms_norm import Kept, Norm, normalised, normalised_back, rms_norm_reference

Qkv = tuple[Tensor, Tensor, Tensor]
Norms = tuple[Norm, Norm] | None


def qkv_rope_reference(
    x: Tensor, q: LowRankLinear, k: LowRankLinear, v: LowRankLinear, cos: Tensor, sin: Tensor, norms: Norms = None
) -> Qkv:
    """The operation in plain PyTorch; the oracle of :func:`qkv_rope`."""
    x, size = x.reshape(-1, x.shape[-1]), cos.shape[-1]

    def project(p: LowRankLinear, norm: Norm | None = None) -> Tensor:
        y = lora_linear_reference(x, p.weight, p.bias, p.A, p.B, p.scaling, p.row_scale, p.drop)
        if norm is not None:
            y = rms_norm_reference(y.reshape(len(x), -1, len(norm.weight)), norm.weight, norm.eps, norm.offset)
        return y.reshape(len(x), -1, size).transpose(0, 1)

    def turn(u: Tensor) -> Tensor:
        first, second = u.chunk(2, -1)
        return u * cos + torch.cat((-second, first), -1) * sin

    of_q, of_k = norms or (None, None)
    return turn(project(q, of_q)), turn(project(k, of_k)), project(v)


@checked("projections and rotation", qkv_rope_reference, "x", "A", "B", "row_scale")
def qkv_rope(
    x: Tensor, q: LowRankLinear, k: LowRankLinear, v: LowRankLinear, cos: Tensor, sin: Tensor, norms: Norms = None
) -> Qkv:
    """Queries, keys and values of a row of tokens, rotated.

    Args:
        x: ``[..., d]`` in the base's dtype, ``T`` rows in all.
        q: ``d -> H D``; k and v: ``d -> K D``; all frozen.
        cos, sin: ``[T, D]`` of each position, in ``x``'s dtype; both halves of a row are the same.
        norms: of queries and keys; a weight of ``[D]`` is for each head, one of ``[H D]`` (``[K D]``) for all together.

    Returns:
        ``[H, T, D]``, ``[K, T, D]`` and ``[K, T, D]``, contiguous.
    """
    if not q.drop == k.drop == v.drop:
        raise ValueError("the three read the same rows: they need one draw of dropout")
    frozen = q.frozen and k.frozen and v.frozen and not any(norm.weight.requires_grad for norm in norms or ())
    if not frozen:
        return qkv_rope_reference(x, q, k, v, cos, sin, norms)
    flat = [t for p in (q, k, v) for t in p.operands(x.dtype)]
    scalings = (q.scaling, k.scaling, v.scaling)
    result: Qkv = _QkvRope.apply(x, cos, sin, scalings, q.drop, Kept.of(x), norms, *flat)  # type: ignore[no-untyped-call]  # torch's own
    return result


def _turn(u: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False) -> Tensor:
    """``R u`` of ``u [heads, T, D]`` into ``out``; ``back`` turns by the opposite angle, which is the gradient."""
    if native.can_take(cos, sin, function="turn") and u.dtype == cos.dtype and u.stride(-1) == out.stride(-1) == 1:
        strides = (*u.stride()[:2], *out.stride()[:2])
        native.call("turn", u, out, cos, sin, *u.shape, *strides, -1.0 if back else 1.0)
        return out
    half = cos.shape[-1] // 2
    (u1, u2), (o1, o2), s = u.chunk(2, -1), out.chunk(2, -1), sin[:, :half]
    torch.mul(u, cos, out=out)  # each product is rounded before the sum, as in transformers: the same bits
    product = u2 * s
    (o1.add_ if back else o1.sub_)(product)
    torch.mul(u1, s, out=product)
    (o2.sub_ if back else o2.add_)(product)
    return out


class _QkvRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        scalings: tuple[float, float, float],
        drop: Dropout | None,
        source: Kept,
        norms: Norms,
        *operands: Any,
    ) -> Qkv:
        weights, biases, As, Bs, scales = (operands[i::5] for i in range(5))
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        rows, size = len(x), cos.shape[-1]
        stacked = torch.cat([scaled(A, s, x.dtype) for A, s in zip(As, scalings)])
        bs = [B.to(x.dtype) for B in Bs]
        less_one = [None if g is None else (g - 1).to(x.dtype) for g in scales]
        hh = sum_of_products(Turned(x, stacked, drop))
        outs: list[Tensor] = []
        kept: list[Tensor | None] = []
        normed: list[tuple[Tensor, Tensor] | tuple[None, None]] = []  # what a norm is of, and its rstd
        for i, h in enumerate(torch.split(hh, [B.shape[1] for B in Bs], 1)):
            u = projected(x, weights[i], biases[i], h, bs[i], less_one[i])
            y = u if less_one[i] is None or biases[i] is None else u + biases[i]
            normed.append((None, None))
            if norms is not None and i < 2:
                before = y.view(-1, len(norms[i].weight))
                y, rstd = normalised(before, norms[i].weight, norms[i].eps, norms[i].offset)
                normed[i] = before, rstd
            y = y.view(rows, -1, size).transpose(0, 1)
            outs.append(_turn(y, cos, sin, y.new_empty(y.shape)) if i < 2 else y.contiguous())
            kept.append(u if less_one[i] is not None and biases[i] is not None else None)
        trains_a = any(ctx.needs_input_grad[7 + 5 * i + 2] for i in range(3))
        kept_x = source[:3] if trains_a else (None, None, None)
        turned = [
            out if g is not None and u is None and before is None else None
            for out, g, u, (before, _) in zip(outs, less_one, kept, normed)
        ]
        befores, rstds = zip(*normed)
        ctx.save_for_backward(*kept_x, hh, cos, sin, *As, *Bs, *less_one, *kept, *turned, *befores, *rstds)
        ctx.weights, ctx.scalings, ctx.drop, ctx.norm, ctx.norms = weights, scalings, drop, source[3:], norms
        ctx.shape = shape
        q, k, v = outs
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, other, norm, hh, cos, sin, *lists = ctx.saved_tensors
        As, Bs, less_one, kept, outs, befores, rstds = (lists[i : i + 3] for i in range(0, 21, 3))
        ranks = [len(A) for A in As]
        flats: list[Tensor] = []
        dBs: list[Tensor] = []
        dgs: list[Tensor | None] = []
        pp = torch.empty_like(hh)
        for i, (grad, h, p) in enumerate(zip(grads, torch.split(hh, ranks, 1), torch.split(pp, ranks, 1))):
            flat, before = _rows_first(grad, cos, sin, turned=i < 2), befores[i]
            z = kept[i] if outs[i] is None else _rows_first(outs[i], cos, sin, turned=i < 2, unit=True)
            if before is not None:
                weight, offset = ctx.norms[i].weight, ctx.norms[i].offset
                dy = flat.view(before.shape)
                flat = normalised_back(dy, before, rstds[i], weight, offset, in_place=True).view(flat.shape)
                z = before.view(flat.shape) if z is None else z
            flat, dg = row_scale_grads(flat, z, less_one[i], in_place=True)
            del z
            flats.append(flat)
            dgs.append(dg)
            sum_of_products(Plain(flat, Bs[i].to(flat.dtype)), out=p)
            dBs.append(factor_grad(h, flat).t())
        dAs: list[Tensor | None] = [None] * 3
        if rows is not None:
            x = Kept(rows, other, norm, *ctx.norm).again()
            dAA = torch.split(factor_grad(pp, x, ctx.drop), ranks)
            del x
            dAs = [dA.mul_(s) for dA, s in zip(dAA, ctx.scalings)]
        dx = None
        if ctx.needs_input_grad[0]:
            stacked = torch.cat([scaled(A, s, hh.dtype) for A, s in zip(As, ctx.scalings)])
            dx = sum_of_products(*map(Plain, flats, ctx.weights), Plain(pp, stacked, ctx.drop)).view(ctx.shape)
        cast = [None if t is None else t.to(master.dtype) for t, master in zip((*dAs, *dBs), (*As, *Bs))]
        operands = [t for i in range(3) for t in (None, None, cast[i], cast[3 + i], dgs[i])]
        return dx, None, None, None, None, None, None, *operands


def _rows_first(t: Tensor, cos: Tensor, sin: Tensor, turned: bool, unit: bool = False) -> Tensor:
    """``[T, heads * D]`` of ``[heads, T, D]``, turned back; ``unit`` undoes a length that cos and sin may give."""
    heads, rows, size = t.shape
    out = t.new_empty(rows, heads, size)
    if turned:
        _turn(t, cos, sin, out.transpose(0, 1), back=True)
        if unit:
            out.div_((cos.square() + sin.square())[:, None])
    else:
        out.transpose(0, 1).copy_(t)
    return out.view(rows, heads * size)
