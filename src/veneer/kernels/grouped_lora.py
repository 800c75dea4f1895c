"""The products of a MoE layer's experts, group by group: a frozen stack of weights with low-rank updates on it.

    y_e = x_e W_e^T + b_e + s (x_e A_e^T) B_e^T        for the rows x_e that were routed to expert e

The routed pairs (token, choice) are sorted by expert once; each expert then works on one block of rows, and its weight
and its update go into one sum (:mod:`veneer.kernels.matmul`). The backward does the same, and never forms ``B_e A_e``
or ``dW_e``:

    P_e = s dY_e B_e      dA_e = P_e^T x_e      dB_e = s dY_e^T h_e      dx_e = dY_e W_e + P_e A_e

Kept for the backward: ``x``, by reference, and ``h = x A^T`` ``[N, r]``. Nothing of the size of a stack exists, beside
the factors and their gradients.
Names: ``T`` tokens, ``k`` choices of each, ``N`` routed pairs, ``E`` experts, ``K`` experts with factors, ``r`` rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.kernels.check import checked
from veneer.kernels.matmul import Plain, Turned, Weight, as_tensor, sum_of_products


class FrozenStack(Protocol):
    """A frozen stack ``[E, out, in]`` that is not a plain tensor."""

    @property
    def shape(self) -> torch.Size: ...

    def to(self, *, dtype: torch.dtype) -> FrozenStack:
        """The same stack, computing in ``dtype``."""

    def index(self, expert: int) -> Weight:
        """``[out, in]``: the weight of one expert."""


Stack: TypeAlias = Tensor | FrozenStack


@dataclass(frozen=True)
class Groups:
    """Which routed pairs belong to which expert."""

    order: Tensor  # [N] int64: the pairs, as token * k + choice, sorted by expert
    counts: tuple[int, ...]  # how many each of the E experts has
    shape: torch.Size  # (T, k)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """``[N]`` int64: the token of each pair."""
        return self.order // self.shape[1]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, each with its block."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    @functools.cached_property
    def ends(self) -> Tensor:
        """``[E]`` int32: where each expert's block ends."""
        return torch.tensor(self.counts, device=self.order.device).cumsum(0, dtype=torch.int32)

    @functools.cached_property
    def experts(self) -> Tensor:
        """``[N]`` int64: the expert of each pair."""
        counts = torch.tensor(self.counts, device=self.order.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(self.order))

    def summed(self, values: Tensor) -> Tensor:
        """``[N, d]`` of the pairs to ``[T, d]``: the sum for each token, in an order that is always the same."""
        pairs = values.new_zeros(self.shape.numel(), values.shape[1]).index_copy(0, self.order, values)
        return pairs.view(*self.shape, -1).sum(1)


def group_by_expert(top_k_index: Tensor, experts: int) -> Groups:
    """Sorts the routed pairs.

    Args:
        top_k_index: ``[T, k]`` int64; ``E`` and above is no expert, and such pairs are left out.
        experts: ``E``.
    """
    flat = top_k_index.reshape(-1)
    counts = tuple(torch.bincount(flat.clamp(max=experts), minlength=experts + 1)[:experts].tolist())
    order = torch.argsort(flat, stable=True)[: sum(counts)]
    return Groups(order, counts, top_k_index.shape)


@dataclass(frozen=True)
class Update:
    """A low-rank update of a stack.

    Attributes:
        A: ``[K, r, in]`` float32 masters: an expert's are cast to the activations' dtype when its turn comes; the
            gradient comes back in float32, in one tensor.
        B: ``[K, out, r]``, likewise.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)``.
        positions: for each of the E experts the place of its factors, or -1 where it has none; None: K = E, in order.
    """

    A: Tensor
    B: Tensor
    scaling: float
    positions: tuple[int, ...] | None = None


def grouped_linear_reference(
    x: Tensor, groups: Groups, weight: Stack, bias: Tensor | None, updates: tuple[Update, ...] = (), *, gather: bool
) -> Tensor:
    """:func:`grouped_linear` in plain PyTorch, differentiable in everything; the oracle."""
    if not isinstance(weight, Tensor):
        coded = weight.to(dtype=x.dtype)
        weight = torch.stack([as_tensor(coded.index(expert)) for expert in range(weight.shape[0])])
    rows = groups.tokens if gather else None
    parts = []
    for expert, span in groups.spans():
        own = _rows(x, rows, span)
        y = F.linear(own, weight[expert].to(x.dtype), None if bias is None else bias[expert].to(x.dtype))
        for update in updates:
            at = expert if update.positions is None else update.positions[expert]
            if at >= 0:
                y = y + update.scaling * (own @ update.A[at].to(x.dtype).t()) @ update.B[at].to(x.dtype).t()
        parts.append(y)
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])


@checked("linear of experts", grouped_linear_reference, "x")
def grouped_linear(
    x: Tensor, groups: Groups, weight: Stack, bias: Tensor | None, updates: tuple[Update, ...] = (), *, gather: bool
) -> Tensor:
    """``x_e W_e^T + b_e`` and the updates, differentiable in ``x``, ``b`` and the factors.

    In a ``W`` that is trained too, by plain operations.

    Args:
        x: ``[T, in]`` the tokens, with ``gather``; else ``[N, in]``, a row for each pair, sorted by expert.
        weight: ``[E, out, in]`` frozen, a tensor (any strides) or codes; computed with in ``x``'s dtype.
        bias: ``[E, out]``, or None.

    Returns:
        ``[N, out]`` in ``x``'s dtype, sorted by expert.
    """
    if isinstance(weight, Tensor) and weight.requires_grad:
        return grouped_linear_reference(x, groups, weight, bias, updates, gather=gather)
    factors = [factor for update in updates for factor in (update.A, update.B)]
    told = [(update.scaling, update.positions) for update in updates]
    y: Tensor = _GroupedLinear.apply(x, groups, weight, gather, told, *factors)  # type: ignore[no-untyped-call]  # torch's
    return y if bias is None else y.add_(bias.to(y.dtype)[groups.experts])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: Groups,
        weight: Stack,
        gather: bool,
        told: list[tuple[float, tuple[int, ...] | None]],
        *factors: Tensor,
    ) -> Tensor:
        rows = groups.tokens if gather else None
        parts = [_Part(x, rows, _Matrices(weight, x.dtype))]
        hidden: list[Tensor] = []
        for A, B, (scaling, positions) in zip(factors[::2], factors[1::2], told):
            hidden.append(_products([_Part(x, rows, _Matrices(A, x.dtype, positions))], groups).mul_(scaling))
            parts.append(_Part(hidden[-1], None, _Matrices(B, x.dtype, positions)))
        ctx.save_for_backward(*((x, *factors, *hidden) if told else ()))
        ctx.groups, ctx.weight, ctx.rows, ctx.told, ctx.shape = groups, weight, rows, told, x.shape
        return _products(parts, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy.contiguous()  # torch's kernel reads no expanded rows
        groups, rows, count = ctx.groups, ctx.rows, len(ctx.told)
        x, *kept = ctx.saved_tensors or [dy]  # to be read but once; without updates it is empty, and x not needed
        factors, hidden = kept[: 2 * count], kept[2 * count :]
        parts = [_Part(dy, None, _Matrices(ctx.weight, dy.dtype))]
        gradients: list[Tensor] = []
        for A, B, h, (scaling, positions) in zip(factors[::2], factors[1::2], hidden, ctx.told):
            p = _grad_input([_Part(dy, None, _Matrices(B, dy.dtype, positions))], None, h.shape, groups).mul_(scaling)
            gradients.append(_grad_weight(p, x, rows, groups, A, positions))
            gradients.append(_grad_weight(dy, h, None, groups, B, positions))
            parts.append(_Part(p, None, _Matrices(A, dy.dtype, positions)))
        dx = _grad_input(parts, rows, ctx.shape, groups) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *gradients


@dataclass(frozen=True)
class _Matrices:
    """A stack as the products see it: in their dtype, and perhaps with matrices for some of the experts only."""

    stack: Stack
    dtype: torch.dtype
    positions: tuple[int, ...] | None = None

    def of(self, expert: int) -> Weight | None:
        """``[out, in]``, or None for an expert that has none."""
        at = expert if self.positions is None else self.positions[expert]
        if at < 0:
            return None
        if isinstance(self.stack, Tensor):
            return self.stack[at].to(self.dtype)
        return self.stack.to(dtype=self.dtype).index(at)

    def whole(self) -> Tensor | None:
        """``[E, out, in]`` for one kernel over all groups; None where there is no such kernel for it."""
        if not isinstance(self.stack, Tensor) or not has_kernel(self.stack.device, self.dtype, self.stack.shape[1:]):
            return None
        stack = self.stack.to(self.dtype)
        if self.positions is None:
            return stack
        # The last row, of zeros, is what -1 points to.
        return torch.cat([stack, stack.new_zeros(1, *stack.shape[1:])])[list(self.positions)]


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Whether torch multiplies all groups by one kernel: bfloat16 on an NVIDIA GPU, rows of a multiple of 16 bytes."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and not any(width % 8 for width in widths)


class _Part(NamedTuple):
    """One summand of an expert's rows."""

    values: Tensor  # a row for each pair, sorted by expert; or for each token, with rows
    rows: Tensor | None
    matrices: _Matrices


def _products(parts: Sequence[_Part], groups: Groups) -> Tensor:
    """The sum of ``x_e W_e^T`` ``[N, out]``; an expert without a matrix adds nothing."""
    values, rows, matrices = parts[0]
    if (whole := matrices.whole()) is not None:
        y = F.grouped_mm(_rows(values, rows), whole.mT, offs=groups.ends)
        return y if len(parts) == 1 else y.add_(_products(parts[1:], groups))
    y = values.new_zeros(len(groups.order), matrices.stack.shape[1])
    for expert, span in groups.spans():
        own = [(_rows(p.values, p.rows, span), p.matrices.of(expert)) for p in parts]
        if turned := [Turned(x, weight) for x, weight in own if weight is not None]:
            sum_of_products(*turned, out=y[span])
    return y


def _grad_input(parts: Sequence[_Part], rows: Tensor | None, shape: torch.Size, groups: Groups) -> Tensor:
    """The sum of ``dY_e W_e`` ``[N, in]``; with ``rows`` it is summed up for each token, in float32, to ``[T, in]``."""
    dy, _, matrices = parts[0]
    if (whole := matrices.whole()) is not None:
        dx = F.grouped_mm(dy, whole, offs=groups.ends)
        if len(parts) > 1:
            dx += _grad_input(parts[1:], None, dx.shape, groups)
        return dx if rows is None else groups.summed(dx)
    dx = dy.new_zeros(shape, dtype=dy.dtype if rows is None else torch.promote_types(dy.dtype, torch.float32))
    for expert, span in groups.spans():
        own = [(p.values[span], p.matrices.of(expert)) for p in parts]
        if plain := [Plain(values, weight) for values, weight in own if weight is not None]:
            if rows is None:
                sum_of_products(*plain, out=dx[span])
            else:
                dx.index_add_(0, rows[span], sum_of_products(*plain).to(dx.dtype))
    return dx.to(dy.dtype)


def _grad_weight(
    dy: Tensor, x: Tensor, rows: Tensor | None, groups: Groups, master: Tensor, positions: tuple[int, ...] | None
) -> Tensor:
    """``dY_e^T x_e`` ``[K, out, in]`` in the master's dtype; zero for an expert without rows."""
    grad = torch.zeros_like(master)
    if has_kernel(dy.device, dy.dtype, master.shape[1:]):
        every = F.grouped_mm(dy.t(), _rows(x, rows), offs=groups.ends)
        return grad.copy_(every if positions is None else every[_owners(positions)])
    for expert, span in groups.spans():
        at = expert if positions is None else positions[expert]
        if at >= 0:
            grad[at] = dy[span].t() @ _rows(x, rows, span)
    return grad


def _rows(x: Tensor, rows: Tensor | None, span: slice = slice(None)) -> Tensor:
    """Some rows of ``x [N, in]``; with ``rows``, of the tokens ``x [T, in]`` that they name."""
    return x[span] if rows is None else x[rows[span]]


def _owners(positions: tuple[int, ...]) -> list[int]:
    """The experts that have factors, in the order of their factors."""
    return sorted((e for e, at in enumerate(positions) if at >= 0), key=positions.__getitem__)
