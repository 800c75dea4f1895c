"""Single trained rows of an embedding or an output head: the other rows stay the base's, and are never copied.

Embedding:  ``y[t] = R[i]`` where ``id[t]`` is the trained token ``i``, else ``E[id[t]]``
Head:       ``z[t, v] = R[i] . h[t] (+ b[v])`` where ``v`` is the trained token ``i``, else ``W[v] . h[t] (+ b[v])``

The rows replace the base's (they are no difference to it), as in PEFT: the vocabulary may have been resized with random
rows. A head that is tied to the embedding reads the embedding's rows. Names: ``V`` vocabulary, ``n`` trained tokens,
``d`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veneer.adapters.layers import keep_dtype, master_dtype, scaled_like

_KEY = "token_adapter.trainable_tokens_delta"  # "delta" is the format's name; the rows are whole


class TokenRows(nn.Module):
    """The rows that one adapter trains.

    Args:
        token_ids: ``n`` different ids, in the order of the rows in the file.
        weight: ``[V, d]`` of the base: the rows start as its rows.
    """

    def __init__(self, token_ids: Sequence[int], weight: Tensor) -> None:
        super().__init__()
        ids = torch.tensor(list(token_ids), dtype=torch.int64, device=weight.device)
        self.rows = nn.Parameter(weight.detach()[ids].to(master_dtype(weight)))  # [n, d]
        self.ids: Tensor  # [n]
        self.sorted_ids: Tensor  # [n], for the binary search
        self.order: Tensor  # [n]: sorted_ids == ids[order]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("order", torch.argsort(ids), persistent=False)
        self.register_buffer("sorted_ids", ids[self.order], persistent=False)

    def find(self, flat_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where the trained tokens stand in ``flat_ids [T]``: ``(positions [m], row of each [m])``."""
        near = torch.searchsorted(self.sorted_ids, flat_ids).clamp_(max=len(self.ids) - 1)
        positions = torch.nonzero(self.sorted_ids[near] == flat_ids).squeeze(-1)
        return positions, self.order[near[positions]]

    def extra_repr(self) -> str:
        return f"tokens={len(self.ids)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenRows:
        super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self


class TokenEmbedding(nn.Module):
    """A frozen embedding, some of whose rows are trained."""

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx

    @property
    def weight(self) -> Tensor:
        """``[V, d]``, the base's own matrix, without the trained rows."""
        return self.base_layer.weight

    def add(self, name: str, token_ids: Sequence[int]) -> TokenRows:
        """New rows, equal to the base's; not active yet."""
        adapter = TokenRows(token_ids, self.weight)
        self.adapters[name] = adapter
        return adapter

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...]`` int64 to ``[..., d]``, in the base's dtype."""
        y: Tensor = self.base_layer(ids)
        for adapter in active_rows(self):
            positions, which = adapter.find(ids.reshape(-1))
            # Gathered in float32: a token may occur in every row of a batch, and its gradients add up in float32.
            rows = scaled_like(self.base_layer, adapter.rows[which].to(y.dtype))
            y = y.reshape(-1, y.shape[-1]).index_copy(0, positions, rows).view(y.shape)
        return y

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by the end of their PEFT key."""
        return _own_rows(self, name)

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The matrix with the trained rows written into a copy."""
        return _with_rows(self, names)


class TokenHead(nn.Module):
    """A frozen output head, some of whose rows are trained: its own, or those of the embedding that it is tied to."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.followed: set[str] = set()  # adapters whose rows belong to the tied embedding
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """``[V, d]``, the base's own matrix, without the trained rows."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """``[V]``, the base's own bias."""
        return self.base_layer.bias

    def add(self, name: str, token_ids: Sequence[int]) -> TokenRows:
        """New rows of the head's own, equal to the base's; not active yet."""
        adapter = TokenRows(token_ids, self.weight)
        self.adapters[name] = adapter
        return adapter

    def follow(self, name: str, rows: TokenRows) -> None:
        """Reads the rows of the tied embedding: one set of parameters, two places where they act."""
        self.adapters[name] = rows
        self.followed.add(name)

    def forward(self, h: Tensor) -> Tensor:
        """``h [..., d]`` to logits ``[..., V]``, in the base's dtype."""
        adapters = active_rows(self)
        if not adapters:
            return self.base_layer(h)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        rows, ids = torch.cat([a.rows for a in adapters]), torch.cat([a.ids for a in adapters])
        return head_with_rows(h, self.weight, self.bias, rows, ids)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by the end of their PEFT key; none for rows that belong to the embedding."""
        return {} if name in self.followed else _own_rows(self, name)

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The matrix with the trained rows written into a copy."""
        return _with_rows(self, names)


def active_rows(layer: TokenEmbedding | TokenHead) -> list[TokenRows]:
    """The rows of ``layer`` that act now."""
    return [layer.adapters[name] for name in layer.active]  # type: ignore[misc]  # ModuleDict's values are untyped


def _own_rows(layer: TokenEmbedding | TokenHead, name: str) -> dict[str, Tensor]:
    if name not in layer.adapters:
        return {}
    adapter = layer.adapters[name]
    assert isinstance(adapter, TokenRows)
    return {_KEY: adapter.rows}


def _with_rows(layer: TokenEmbedding | TokenHead, names: Iterable[str]) -> dict[str, Tensor]:
    weight = layer.weight.detach()
    changed = False
    for name in names:
        if name in layer.adapters:
            adapter = layer.adapters[name]
            assert isinstance(adapter, TokenRows)
            weight = weight.index_copy(0, adapter.ids, adapter.rows.detach().to(weight.dtype))
            changed = True
    return {"weight": weight} if changed else {}


def head_with_rows_reference(h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, ids: Tensor) -> Tensor:
    """The operation in plain PyTorch, with a full copy of the matrix; the oracle of :func:`head_with_rows`."""
    return F.linear(h, weight.index_copy(0, ids, rows.to(weight.dtype)), bias)


def head_with_rows(h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, ids: Tensor) -> Tensor:
    """Logits of a frozen head whose rows ``ids`` are replaced by ``rows``, without a copy of the head.

    Args:
        h: ``[..., d]``.
        weight: ``[V, d]`` frozen; bias: ``[V]`` frozen, or None.
        rows: ``[n, d]`` float32 master; cast to ``h``'s dtype, its gradient comes back in its own.
        ids: ``[n]`` int64, all different.

    Returns:
        ``[..., V]`` in ``h``'s dtype.
    """
    result: Tensor = _HeadWithRows.apply(h, weight, bias, rows, ids)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _HeadWithRows(torch.autograd.Function):
    """``dh = g W + g_n (R - W_n)``, ``dR = g_n^T h``, where ``g_n [T, n]`` are the trained tokens' columns of ``g``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, ids: Tensor) -> Tensor:
        flat, cast = h.reshape(-1, h.shape[-1]), rows.to(h.dtype)
        logits = F.linear(flat, weight, bias)
        logits.index_copy_(1, ids, F.linear(flat, cast, None if bias is None else bias[ids]))
        ctx.save_for_backward(flat, weight, cast, ids)
        ctx.dtype = rows.dtype
        return logits.view(*h.shape[:-1], logits.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, cast, ids = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        g_n = g.index_select(1, ids)
        dh = drows = None
        if ctx.needs_input_grad[0]:
            dh = (g @ weight).addmm_(g_n, cast - weight[ids]).view(*grad.shape[:-1], flat.shape[-1])
        if ctx.needs_input_grad[3]:
            drows = (g_n.t() @ flat).to(ctx.dtype)
        return dh, None, None, drows, None
