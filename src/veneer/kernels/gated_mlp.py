"""A gated MLP with low-rank updates on its three linears, as one differentiable operation.

``y = down(act(gate(x)) * up(x))``, each linear with its own ``s B A`` (Shazeer 2020, eq. 6; Hu et al. 2021, eq. 3).

Kept for the backward: ``x`` (or what a norm made it from), ``e = gate(x)``, ``g = up(x)`` (scaled, before their biases;
on demand computed again instead of kept) and the rank-r rows;
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

from veneer.kernels import native
from veneer.kernels.check import checked
from veneer.kernels.dropout import Dropout
from veneer.kernels.lora_linear import (
    lora_linear_reference,
    low_rank_forward,
    projected,
    row_scale_grads,
    scaled,
    unflattened,
    whole_rank,
)
from veneer.kernels.matmul import Plain, Turned, Weight, factor_grad, sum_of_products
from veneer.kernels.rms_norm import Kept

TILE = 4096  # rows
Scales = tuple[Tensor | None, Tensor | None]  # of gate and up
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


def _gated(name: str, e: Tensor, g: Tensor) -> Tensor:
    """``act(e) * g``."""
    if not native.can_take(e, g, function=f"gate_{name}"):
        return activation(name, e).mul_(g)
    m = torch.empty_like(e)
    native.call(f"gate_{name}", e, g, m, None, None, m.numel(), 0)
    return m


def _gated_grads(name: str, e: Tensor, g: Tensor, dm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(de, dg, m)`` of ``m = act(e) * g``; ``dm`` is used up."""
    if native.can_take(e, g, dm, function=f"gate_{name}"):
        dg, m = torch.empty_like(e), torch.empty_like(e)
        native.call(f"gate_{name}", e, g, dm, dg, m, dg.numel(), 1)
        return dm, dg, m
    value = activation(name, e)
    dg = value * dm
    dm.mul_(g)
    if name == "silu":
        de: Tensor = torch.ops.aten.silu_backward(dm, e)
    else:
        de = torch.ops.aten.gelu_backward(dm, e, approximate="tanh" if name == "gelu_tanh" else "none")
    return de, dg, value.mul_(g)


class _Scaled:
    """A gated product of scaled projections, in passes that scale on the way and write no scaled one."""

    def __init__(self, name: str, like: Tensor, ke: Tensor | None, kg: Tensor | None) -> None:
        self._name = f"gate_{name}_scaled"
        zeros = like.new_zeros(like.shape[1])
        self._has = ke is not None, kg is not None
        self._ke, self._kg = zeros if ke is None else ke, zeros if kg is None else kg

    @staticmethod
    def takes(name: str, like: Tensor, scales: Scales, biases: Scales) -> bool:
        """Whether there is such code for it: a projection that is scaled has no bias."""
        plain = all(k is None or b is None for k, b in zip(scales, biases)) and any(k is not None for k in scales)
        return plain and native.can_take(like, function=f"gate_{name}_scaled")

    def product(self, e: Tensor, g: Tensor) -> Tensor:
        """``act(e (1 + ke)) g (1 + kg)``."""
        m = torch.empty_like(e)
        native.call(self._name, e, g, self._ke, self._kg, m, *e.shape)
        return m

    def grads(self, e: Tensor, g: Tensor, dm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of ``e`` (in the place of ``dm``) and ``g``; the product; and the gradients of the scales ``[f]`` float32."""
        dg, m, sums = torch.empty_like(g), torch.empty_like(g), e.new_empty(2, e.shape[1], dtype=torch.float32)
        native.call(f"{self._name}_back", e, g, self._ke, self._kg, dm, dg, m, *sums, *e.shape)
        of_e, of_g = (total if has else None for total, has in zip(sums, self._has))
        return dm, dg, m, of_e, of_g


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
        recompute: compute ``gate(x)`` and ``up(x)`` again in the backward instead of keeping them. It then goes by
            tiles of :data:`TILE` rows, and nothing of size ``[T, f]`` exists.

    Returns:
        ``[..., d]`` in ``x``'s dtype.
    """
    if gate.drop != up.drop:
        raise ValueError("gate and up read the same rows: they need one draw of dropout")
    if not (gate.frozen and up.frozen and down.frozen):
        return gated_mlp_reference(x, gate, up, down, act)
    flat = [t for p in (gate, up, down) for t in p.operands(x.dtype)]
    scalings, drops = (gate.scaling, up.scaling, down.scaling), (gate.drop, down.drop)

    def apply(x: Tensor, source: Kept, before: int = 0) -> Tensor:
        own = tuple(None if drop is None else drop.after(before) for drop in drops)
        result: Tensor = _GatedMlp.apply(x, act, recompute, scalings, own, source, *flat)  # type: ignore[no-untyped-call]  # torch's
        return result

    if not recompute or x.numel() <= TILE * x.shape[-1]:
        return unflattened(apply(x, Kept.of(x)), x)
    parts = zip(torch.split(x.reshape(-1, x.shape[-1]), TILE), Kept.of(x).split(TILE))
    return unflattened(torch.cat([apply(*part, TILE * number) for number, part in enumerate(parts)]), x)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        act: str,
        recompute: bool,
        scalings: tuple[float, float, float],
        drops: tuple[Dropout | None, Dropout | None],
        rows: Kept,
        *operands: Any,
    ) -> Tensor:
        wg, bg, Ag, Bg, rg, wu, bu, Au, Bu, ru, wd, bd, Ad, Bd, rd = operands
        sg, su, sd = scalings
        bbg, bbu, bbd = (t.to(x.dtype) for t in (Bg, Bu, Bd))
        kg, ku, kd = (None if r is None else (r - 1).to(x.dtype) for r in (rg, ru, rd))
        flat = x.reshape(-1, x.shape[-1])
        stacked, ad = torch.cat((scaled(Ag, sg, x.dtype), scaled(Au, su, x.dtype))), scaled(Ad, sd, x.dtype)
        hh = sum_of_products(Turned(flat, stacked, drops[0]))
        is_folded = _Scaled.takes(act, flat[:0], (kg, ku), (bg, bu))
        e = projected(flat, wg, bg, hh[:, : len(Ag)], bbg, None if is_folded else kg)
        g = projected(flat, wu, bu, hh[:, len(Ag) :], bbu, None if is_folded else ku)
        if is_folded:
            m = _Scaled(act, e, kg, ku).product(e, g)
        else:
            m = _gated(act, e if kg is None or bg is None else e + bg, g if ku is None or bu is None else g + bu)
        u, hd = low_rank_forward(m, wd, bd, ad, bbd, drops[1], kd)
        y = u if kd is None or bd is None else u + bd
        trains_a = any(ctx.needs_input_grad[i] for i in (8, 13))
        halves = (None, None) if recompute else (e, g)
        kept_x = rows[:3] if trains_a or recompute else (None, None, None)
        kept = (*kept_x, *halves, hh, hd, Ag, Bg, Au, Bu, Ad, Bd)
        ctx.save_for_backward(*kept, kg, ku, kd, u if kd is not None else None)
        ctx.weights, ctx.biases, ctx.trains_a = (wg, wu, wd), (bg, bu), trains_a
        ctx.act, ctx.scalings, ctx.drops, ctx.norm = act, scalings, drops, rows[3:]
        ctx.shape, ctx.is_folded = x.shape, is_folded
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, other, norm, e0, g0, hh, hd, Ag, Bg, Au, Bu, Ad, Bd, kg, ku, kd, u = ctx.saved_tensors
        source = Kept(rows, other, norm, *ctx.norm)
        wg, wu, wd = ctx.weights
        sg, su, sd = ctx.scalings
        rank = len(Ag)
        bg, bu, bd = (B.to(dy.dtype) for B in (Bg, Bu, Bd))
        if e0 is None:
            x = source.again()
            e0 = projected(x, wg, ctx.biases[0], hh[:, :rank], bg, None if ctx.is_folded else kg)
            g0 = projected(x, wu, ctx.biases[1], hh[:, rank:], bu, None if ctx.is_folded else ku)
            del x
        flat, drd = row_scale_grads(dy, u, kd)
        folded = _Scaled(ctx.act, e0, kg, ku) if ctx.is_folded else None
        e, g = (z if k is None or b is None else z + b for z, k, b in zip((e0, g0), (kg, ku), ctx.biases))
        drop, drop_down = ctx.drops
        pd, dBd = sum_of_products(Plain(flat, bd)), factor_grad(hd, flat).t()
        dm = sum_of_products(Plain(flat, wd), Plain(pd, scaled(Ad, sd, dy.dtype), drop_down))
        if folded is None:
            de, dg, m = _gated_grads(ctx.act, e, g, dm)
            de, drg = row_scale_grads(de, e0, kg, in_place=True)
            dg, dru = row_scale_grads(dg, g0, ku, in_place=True)
        else:
            de, dg, m, drg, dru = folded.grads(e0, g0, dm)
        dAd = factor_grad(pd, m, drop_down).mul_(sd) if ctx.needs_input_grad[18] else None
        del m, dm, e, g
        # P of gate and up side by side: one read of x for both dA, one product with stacked A for dx.
        pp = torch.empty_like(hh)
        sum_of_products(Plain(de, bg), out=pp[:, :rank])
        sum_of_products(Plain(dg, bu), out=pp[:, rank:])
        dAA = factor_grad(pp, source.again(), drop) if ctx.trains_a else None
        dBg, dBu = factor_grad(hh[:, :rank], de).t(), factor_grad(hh[:, rank:], dg).t()
        dx = None
        if ctx.needs_input_grad[0]:
            sa = torch.cat((scaled(Ag, sg, dy.dtype), scaled(Au, su, dy.dtype)))
            dx = sum_of_products(Plain(de, wg), Plain(dg, wu), Plain(pp, sa, drop))
            dx = dx.view(ctx.shape)
        dAg, dAu = (None, None) if dAA is None else (dAA[:rank].mul_(sg), dAA[rank:].mul_(su))
        grads = (dAg, dBg, dAu, dBu, dAd, dBd)
        masters = (Ag, Bg, Au, Bu, Ad, Bd)
        gag, gbg, gau, gbu, gad, gbd = (None if t is None else t.to(m.dtype) for t, m in zip(grads, masters))
        gate, up, down = (None, None, gag, gbg, drg), (None, None, gau, gbu, dru), (None, None, gad, gbd, drd)
        return dx, None, None, None, None, None, *gate, *up, *down
