"""Causal attention inside documents that lie one after another in a packed row.

``o = softmax(s q k^T + causal) v``  (Vaswani et al. 2017, eq. 1), each document for itself, a key head serving several
query heads. Queries are taken in tiles of rows, each against the keys up to its own end, so that the masked half of the
scores is never computed and memory is one tile's scores, not ``L^2``. For the documents of fine-tuning this is several
times faster on a CPU than the flash kernel's backward.

Kept for the backward: q, k and v in their own dtype, nothing of the scores' size:

    P  = softmax(S)                        computed again, tile by tile
    dS = P * (dP - rowsum(dP * P))         with dP = dO V^T

Native code also keeps the output, which the output projection keeps as well, and the logarithm of each query's sum of
exponentials: then ``P = exp(S - lse)`` and ``rowsum(dP * P) = dO . O`` need no whole row of scores, and keys are taken
512 at a time (Dao et al. 2022).

Documents that begin with the same tokens (one system prompt) may share them: the beginning then stands in the row once,
as its first document, and the others read its keys and values before their own. The result is the same, since under a
causal mask a beginning does not know what follows it; its gradient is the sum over all who read it.

On a GPU each document goes to PyTorch's attention (:func:`by_documents`), unless a window, a cap or sinks are wanted.

Names: ``T`` positions of the packed row, ``L`` of one document, ``H`` query heads, ``K`` key heads, ``D`` head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from veneer.kernels import native
from veneer.kernels.check import checked

TILE = 256


def document_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The operation in plain PyTorch with one dense mask; the oracle of :func:`document_attention`."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    position = torch.cat([torch.arange(n) + (prefix if i else 0) for i, n in enumerate(lengths)]).to(q.device)
    distance = position[:, None] - position[None, :]
    allowed = (document[:, None] == document[None, :]) & (distance >= 0)
    if prefix:
        allowed |= (document[:, None] > 0) & (document[None, :] == 0)
    if window is not None:
        allowed &= distance < window
    groups = q.shape[0] // k.shape[0]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.repeat_interleave(groups, 0).transpose(-1, -2)).to(wide) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(*scores.shape[:2], 1)), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[1]].to(q.dtype)
    return weights @ v.repeat_interleave(groups, 0)


@checked("attention", document_attention_reference, "q", "k", "v")
def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention, isolated per document.

    Args:
        q: ``[H, T, D]``; k: ``[K, T, D]`` with ``H`` a multiple of ``K``; v: ``[K, T, E]``, usually with ``E = D``.
        lengths: the documents' lengths, summing to ``T``.
        scaling: factor on the scores, usually ``1 / sqrt(D)``.
        window: a position sees this many positions back at most, itself included (sliding window).
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        prefix: 0, or the length of the first document, which is then the beginning that all others share.
        sinks: ``[H]``, frozen: a score of each head that takes its part of the softmax and has no value (gpt-oss).

    Returns:
        ``[H, T, E]`` in ``q``'s dtype.
    """
    if prefix not in (0, lengths[0]):
        raise ValueError(f"a shared beginning of {prefix} positions must be the first document, of {lengths[0]}")
    if q.device.type == "cuda" and window is None and softcap is None and sinks is None:
        return by_documents(q, k, v, lengths, scaling, prefix)
    result: Tensor = _DocumentAttention.apply(q, k, v, tuple(lengths), scaling, window, softcap, prefix, sinks)  # type: ignore[no-untyped-call]  # torch's own
    return result


def by_documents(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scaling: float, prefix: int = 0) -> Tensor:
    """The same by PyTorch's own attention, a call for each document: on a GPU that is its flash kernel."""
    outs = []
    for start, length in zip(itertools.accumulate(lengths, initial=0), lengths):
        shared, end = prefix if start else 0, start + length
        keys, values = (_keys(t, start, end, shared)[None] for t in (k, v))
        mask: Any = causal_lower_right(length, shared + length) if shared else None
        options: dict[str, Any] = {"scale": scaling, "is_causal": not shared, "enable_gqa": len(q) > len(k)}
        outs.append(F.scaled_dot_product_attention(q[None, :, start:end], keys, values, attn_mask=mask, **options))
    return torch.cat(outs, 2)[0]


def _tiles(lengths: Sequence[int], window: int | None, prefix: int) -> Iterator[tuple[int, int, int, int]]:
    """``(first query, end of queries, first own key, shared keys before it)`` of each tile; the keys end where the
    queries end."""
    for start, length in zip(itertools.accumulate(lengths, initial=0), lengths):
        shared = prefix if start else 0
        for row in range(start, start + length, TILE):
            # With shared keys all own ones are taken, so that the two lie end to end as they do in the document.
            first = start if window is None or shared else max(start, row - window + 1)
            yield row, min(row + TILE, start + length), first, shared


def _keys(t: Tensor, first: int, end: int, shared: int) -> Tensor:
    """``[K, shared + end - first, D]``: the shared rows, then the document's own."""
    return torch.cat((t[:, :shared], t[:, first:end]), 1) if shared else t[:, first:end]


def _add_keys(total: Tensor, part: Tensor, first: int, end: int, shared: int) -> None:
    """Adds the gradient of what :func:`_keys` returned to where it came from."""
    if shared:
        total[:, :shared] += part[:, :shared]
    total[:, first:end] += part[:, shared:]


@functools.lru_cache(maxsize=32)
def _mask(rows: int, keys: int, groups: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[groups * rows, keys]``: 0 where a key may be seen, -inf elsewhere; the last query stands at the last key."""
    distance = torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    blocked = distance < 0
    if window is not None:
        blocked |= distance >= window
    return torch.zeros(rows, keys, dtype=dtype, device=device).masked_fill_(blocked, float("-inf")).repeat(groups, 1)


def _weights(
    q: Tensor, k: Tensor, rows: int, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``(P [K, G * rows, keys], tanh of the cap or None)`` for ``q [K, G * rows, D]`` and ``k [K, keys, D]``.

    With sinks the rows of ``P`` sum to less than one, and its gradient keeps its form: a sink has no value.
    """
    keys, tanh = k.shape[1], None
    if softcap is None and sinks is None and scaling > 0 and native.can_take(q, function="softmax"):
        scores = torch.bmm(q, k.transpose(1, 2))
        native.call("softmax", scores, len(q) * q.shape[1], keys, rows, window or 0, scaling)
        return scores, None
    mask = _mask(rows, keys, q.shape[1] // rows, window, q.dtype, q.device)
    if softcap is None:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
    else:
        tanh = torch.tanh(torch.bmm(q, k.transpose(1, 2)).mul_(scaling / softcap))
        scores = tanh * softcap + mask
    if sinks is None:
        return torch.softmax(scores, -1), tanh
    heads = sinks.to(q.dtype).view(len(q), -1, 1).expand(-1, -1, q.shape[1] * len(q) // len(sinks))
    scores = torch.cat((scores, heads.reshape(*q.shape[:2], 1)), -1)
    return torch.softmax(scores, -1)[..., :-1].contiguous(), tanh


def _softmax_grad(dweights: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """``scaling * P (dP - rowsum(P dP))``, perhaps in the place of ``dP``."""
    if native.can_take(dweights, weights, function="softmax_back"):
        native.call("softmax_back", dweights, weights, weights.numel() // weights.shape[-1], weights.shape[-1], scaling)
        return dweights
    ds: Tensor = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
    return ds.mul_(scaling)


def _native_shape(
    q: Tensor, k: Tensor, lengths: Sequence[int], scaling: float, window: int | None, prefix: int
) -> tuple[int | float | Tensor, ...]:
    """What the native code is told of the sizes, after the tensors."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    groups = len(q) // len(k)
    return len(q), groups, q.shape[1], q.shape[2], len(lengths), starts, prefix, window or 0, scaling


def _native_takes(q: Tensor, k: Tensor, v: Tensor, scaling: float, *special: object) -> bool:
    """Whether the native code computes this: heads of a whole number of vectors, no cap, no sinks."""
    usual = all(option is None for option in special) and scaling > 0
    return usual and v.shape == k.shape and q.shape[2] % 16 == 0 and native.can_take(q, k, v, function="attention")


def _native_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    documents: int,
    prefix: int,
    shape: tuple[int | float | Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """``dQ, dK, dV``; of a shared beginning the native code gives the last two by document."""
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    shared = k.new_empty(2, len(k), documents, prefix, k.shape[2], dtype=torch.float32)
    if dout.stride(2) != 1:
        dout = dout.contiguous()
    steps = dout.stride(1), dout.stride(0)
    native.call("attention_back", q, k, v, out, lse, dout, *steps, dq, dk, dv, *shared, *shape)
    if prefix:
        dk[:, :prefix], dv[:, :prefix] = shared.sum(2)
    return dq, dk, dv


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scaling: float,
        window: int | None,
        softcap: float | None,
        prefix: int,
        sinks: Tensor | None,
    ) -> Tensor:
        ctx.arguments = (lengths, scaling, window, softcap, prefix)
        heads, length, size = q.shape
        groups = heads // k.shape[0]
        if _native_takes(q, k, v, scaling, softcap, sinks):
            # By positions, as the output projection reads it, whose kept input it then is.
            out = q.new_empty_strided((heads, length, size), (size, heads * size, 1))
            lse = q.new_empty(heads, length, dtype=torch.float32)
            native.call("attention", q, k, v, out, lse, *_native_shape(q, k, lengths, scaling, window, prefix))
            ctx.save_for_backward(q, k, v, None, out, lse)
            return out
        ctx.save_for_backward(q, k, v, sinks, None, None)
        out = q.new_empty(heads, length, v.shape[2])
        for row, end, first, shared in _tiles(lengths, window, prefix):
            qt = q[:, row:end].reshape(-1, groups * (end - row), size)
            kt, vt = _keys(k, first, end, shared), _keys(v, first, end, shared)
            weights, _ = _weights(qt, kt, end - row, scaling, window, softcap, sinks)
            out[:, row:end] = torch.bmm(weights, vt).view(heads, end - row, -1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        lengths, scaling, window, softcap, prefix = ctx.arguments
        if out is not None:
            shape = _native_shape(q, k, lengths, scaling, window, prefix)
            grads = _native_grads(q, k, v, out, lse, dout, len(lengths), prefix, shape)
            return *grads, None, None, None, None, None, None
        heads, _, size = q.shape
        groups = heads // k.shape[0]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros_like(k, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(v, memory_format=torch.contiguous_format)
        for row, end, first, shared in _tiles(lengths, window, prefix):
            rows = groups * (end - row)
            qt, dot = (t[:, row:end].reshape(len(k), rows, t.shape[2]) for t in (q, dout))
            kt, vt = _keys(k, first, end, shared), _keys(v, first, end, shared)
            weights, tanh = _weights(qt, kt, end - row, scaling, window, softcap, sinks)
            _add_keys(dv, torch.bmm(weights.transpose(1, 2), dot), first, end, shared)
            dweights = torch.bmm(dot, vt.transpose(1, 2))
            ds = _softmax_grad(dweights, weights, scaling)
            if tanh is not None:
                ds.mul_(1 - tanh.square_())
            dq[:, row:end] = torch.bmm(ds, kt).view(heads, end - row, size)
            _add_keys(dk, torch.bmm(ds.transpose(1, 2), qt), first, end, shared)
            del weights, tanh, dweights, ds  # else they are there while the next tile's are made
        return dq, dk, dv, None, None, None, None, None, None
