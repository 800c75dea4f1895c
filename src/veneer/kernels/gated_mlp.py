"""A gated MLP with low-rank updates on its three linears, as one differentiable operation.

``y = down(act(gate(x)) * up(x))``, each linear with its own ``s B A`` (Shazeer 2020, eq. 6; Hu et al. 2021, eq. 3).

Kept for the backward: ``x``, ``e = gate(x)``, ``g = up(x)`` (scaled, before their biases; on demand computed again
instead of kept) and the rank-r rows;
``act(e)`` and the product are computed again from ``e`` and ``g`` (elementwise, no matrix product), so fewer ``[T, f]``
tensors are kept than eager code keeps, and no intermediate of the activation. ``A`` of gate and up are stacked: they
read ``x`` once.
Names: ``T`` rows, ``d`` width, ``f`` hidden width, ``r`` rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels.check import checked
from veneer.kernels.dropout import Dropout
from veneer.kernels.frozen import Weight, add_matmul_grad, matmul_grad, matmul_weight
from veneer.kernels.lora_linear import (
    add_low_rank,
    lora_linear_reference,
    low_rank_forward,
    low_rank_grads,
    masked,
    row_scale_grads,
    scale_rows,
    whole_rank,
)

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True)
class LowRankLinear:
    """The operands of one frozen linear and its update."""

    weight: Weight  # [out, in] frozen, a tensor or codes
    bias: Tensor | None  # [out] frozen
    A: Tensor  # [r, in] float32
    B: Tensor  # [out, r] float32
    scaling: float
    row_scale: Tensor | None = None  # [out] float32
    drop: Dropout | None = None  # on what A sees; the same for linears that read the same rows

    @property
    def frozen(self) -> bool:
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def operands(self, dtype: torch.dtype) -> tuple[Weight | None, ...]:
        """``weight, bias, A, B, row_scale`` for products in a dtype."""
        return self.weight, self.bias, *whole_rank(self.A, self.B, dtype), self.row_scale


def activation(name: str, e: Tensor) -> Tensor:
    """``silu``, ``gelu`` or ``gelu_tanh`` of ``e``."""
    if name == "silu":
        return F.silu(e)
    return F.gelu(e, approximate="tanh" if name == "gelu_tanh" else "none")


def _activation_grad(name: str, grad: Tensor, e: Tensor) -> Tensor:
    if name == "silu":
        out: Tensor = torch.ops.aten.silu_backward(grad, e)
    else:
        out = torch.ops.aten.gelu_backward(grad, e, approximate="tanh" if name == "gelu_tanh" else "none")
    return out


def gated_mlp_reference(
    x: Tensor, gate: LowRankLinear, up: LowRankLinear, down: LowRankLinear, act: str = "silu", recompute: bool = False
) -> Tensor:
    """The operation in plain PyTorch; the oracle of :func:`gated_mlp`."""

    def linear(x: Tensor, p: LowRankLinear) -> Tensor:
        return lora_linear_reference(x, p.weight, p.bias, p.A, p.B, p.scaling, p.row_scale, p.drop)

    return linear(activation(act, linear(x, gate)) * linear(x, up), down)


@checked("gated MLP", gated_mlp_reference, "x", "A", "B", "row_scale")
def gated_mlp(
    x: Tensor, gate: LowRankLinear, up: LowRankLinear, down: LowRankLinear, act: str = "silu", recompute: bool = False
) -> Tensor:
    """``down(act(gate(x)) * up(x))``.

    Args:
        x: ``[..., d]`` in the base's dtype.
        gate, up: linears ``d -> f``; down: ``f -> d``; ranks may differ.
        act: one of :data:`ACTIVATIONS`.
        recompute: compute ``gate(x)`` and ``up(x)`` again in the backward instead of keeping them.

    Returns:
        ``[..., d]`` in ``x``'s dtype.
    """
    if gate.drop != up.drop:
        raise ValueError("gate and up read the same rows: they need one draw of dropout")
    if not (gate.frozen and up.frozen and down.frozen):
        return gated_mlp_reference(x, gate, up, down, act)
    flat = [t for p in (gate, up, down) for t in p.operands(x.dtype)]
    scalings, drops = (gate.scaling, up.scaling, down.scaling), (gate.drop, down.drop)
    result: Tensor = _GatedMlp.apply(x, act, recompute, scalings, drops, *flat)  # type: ignore[no-untyped-call]  # torch's
    return result


def _projected(
    x: Tensor, weight: Weight, bias: Tensor | None, h: Tensor, b: Tensor, s: float, less_one: Tensor | None
) -> Tensor:
    """``x W^T + s h B^T + b``; with a row scale it is scaled, and before its bias."""
    y = matmul_weight(x, weight, bias if less_one is None else None).addmm_(h, b.t(), alpha=s)
    return y if less_one is None else y.addcmul_(y, less_one)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        act: str,
        recompute: bool,
        scalings: tuple[float, float, float],
        drops: tuple[Dropout | None, Dropout | None],
        *operands: Any,
    ) -> Tensor:
        wg, bg, Ag, Bg, rg, wu, bu, Au, Bu, ru, wd, bd, Ad, Bd, rd = operands
        sg, su, sd = scalings
        ag, bbg, au, bbu, ad, bbd = (t.to(x.dtype) for t in (Ag, Bg, Au, Bu, Ad, Bd))
        kg, ku, kd = (None if r is None else (r - 1).to(x.dtype) for r in (rg, ru, rd))
        flat = x.reshape(-1, x.shape[-1])
        stacked = torch.cat((ag, au))
        hh = masked(flat, drops[0]) @ stacked.t()
        hg, hu = hh[:, : len(ag)], hh[:, len(ag) :]
        e = _projected(flat, wg, bg, hg, bbg, sg, kg)
        g = _projected(flat, wu, bu, hu, bbu, su, ku)
        m = activation(act, e if kg is None or bg is None else e + bg).mul_(g if ku is None or bu is None else g + bu)
        u, hd = low_rank_forward(m, wd, bd if kd is None else None, ad, bbd, sd, drops[1])
        y = scale_rows(u, kd, bd)
        trains_a = any(ctx.needs_input_grad[i] for i in (7, 12))
        halves = (None, None) if recompute else (e, g)
        kept = (flat if trains_a or recompute else None, *halves, hh, hd, stacked, bbg, bbu, ad, bbd)
        ctx.save_for_backward(*kept, kg, ku, kd, u if kd is not None else None)
        ctx.weights, ctx.biases, ctx.trains_a = (wg, wu, wd), (bg, bu), trains_a
        ctx.act, ctx.scalings, ctx.drops, ctx.dtypes = act, scalings, drops, [t.dtype for t in (Ag, Bg, Au, Bu, Ad, Bd)]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, e0, g0, hh, hd, stacked, bg, bu, ad, bd, kg, ku, kd, u = ctx.saved_tensors
        wg, wu, wd = ctx.weights
        sg, su, sd = ctx.scalings
        rank = bg.shape[1]
        if e0 is None:
            e0 = _projected(x, wg, ctx.biases[0], hh[:, :rank], bg, sg, kg)
            g0 = _projected(x, wu, ctx.biases[1], hh[:, rank:], bu, su, ku)
        flat = dy.reshape(-1, dy.shape[-1])
        flat, drd = row_scale_grads(flat, u, kd)
        e, g = (z if k is None or b is None else z + b for z, k, b in zip((e0, g0), (kg, ku), ctx.biases))
        a = activation(ctx.act, e)
        m = a * g
        drop, drop_down = ctx.drops
        pd, dAd, dBd = low_rank_grads(flat, masked(m, drop_down) if ctx.needs_input_grad[17] else None, hd, bd, sd)
        dm = matmul_grad(flat, wd, out=m)  # m is not needed any more: its memory is reused
        dm = add_low_rank(dm, pd, ad, sd, drop_down)
        dg = a.mul_(dm)
        de = _activation_grad(ctx.act, dm.mul_(g), e)
        del a, m, dm, e, g
        de, drg = row_scale_grads(de, e0, kg, in_place=True)
        dg, dru = row_scale_grads(dg, g0, ku, in_place=True)
        # P of gate and up side by side, already scaled: one read of x for both dA, one product with stacked A for dx.
        pp = torch.cat(((de @ bg).mul_(sg), (dg @ bu).mul_(su)), dim=1)
        dAA = pp.t() @ masked(x, drop) if ctx.trains_a else None
        dBg = (de.t() @ hh[:, :rank]).mul_(sg)
        dBu = (dg.t() @ hh[:, rank:]).mul_(su)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = add_low_rank(add_matmul_grad(matmul_grad(de, wg), dg, wu), pp, stacked, 1.0, drop)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        dAg, dAu = (None, None) if dAA is None else (dAA[:rank], dAA[rank:])
        grads = (dAg, dBg, dAu, dBu, dAd, dBd)
        gag, gbg, gau, gbu, gad, gbd = (None if t is None else t.to(d) for t, d in zip(grads, ctx.dtypes))
        gate, up, down = (None, None, gag, gbg, drg), (None, None, gau, gbu, dru), (None, None, gad, gbd, drd)
        return dx, None, None, None, None, *gate, *up, *down
