"""The adapted layers: a frozen base layer and one object per adapter.

    y = W x + b + sum over active adapters of  s B (A dropout(x))        (Hu et al. 2021, eq. 3)

With no adapter active, a layer calls its base layer and nothing else, so that adapter off is the base bit for bit.
Names: ``T`` rows (all leading dimensions flattened), ``r`` rank, ``V`` vocabulary, ``d`` width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels.frozen import Weight, as_tensor
from veneer.kernels.lora_linear import lora_linear
from veneer.quant import QuantizedLinear


@dataclass(frozen=True)
class LoraFactors:
    """The trained layer over one linear, ``W x + scaling * B (A x)``, as it acts right now."""

    A: Tensor  # [r, in]   down projection
    B: Tensor  # [out, r]  up projection, zero at the start
    scaling: float  # alpha / r, or alpha / sqrt(r) with rank stabilisation
    dropout: float  # on the input of A; 0.0 outside of training


def master_dtype(tensor: Weight) -> torch.dtype:
    """The dtype of a trained tensor over ``tensor``: float32, or float64 over float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``nn.Module._apply`` with its moves but without its casts.

    A later ``module.to(torch.bfloat16)`` must not round the trained tensors: small updates would be lost.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class LoraAdapter(nn.Module):
    """The factors that one adapter has at one layer.

    Args:
        width_in: columns of A (an embedding: its vocabulary).
        width_out: rows of B.
        r: rank.
        scaling: factor before ``B A``.
        dropout: probability of dropping an element of A's input while training.
        like: a tensor of the base layer: gives the device, and the dtype through :func:`master_dtype`.
    """

    def __init__(self, width_in: int, width_out: int, r: int, scaling: float, dropout: float, like: Weight) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(r, width_in, dtype=master_dtype(like), device=like.device))
        self.B = nn.Parameter(torch.zeros(width_out, r, dtype=master_dtype(like), device=like.device))
        self.scaling, self.dropout = scaling, dropout

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """``[out, in]``, the dense update, in the factors' dtype (float32): bfloat16 would lose its small entries."""
        return self.scaling * (self.B.detach() @ self.A.detach())

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraAdapter:
        super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self


class LoraLinear(nn.Module):
    """A frozen linear with adapters.

    Args:
        base_layer: an ``nn.Linear`` or ``QuantizedLinear`` (weight ``[out, in]``), or GPT-2 ``Conv1D`` (``[in, out]``).
        transposed: the base's weight is ``[in, out]``.
    """

    def __init__(self, base_layer: nn.Module, *, transposed: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.transposed = transposed
        rows, columns = self.weight.shape
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)

    @property
    def weight(self) -> Weight:
        """The base's own weight, as it lies there, perhaps in codes; without the adapters."""
        return self.base_layer.weight  # type: ignore[return-value]  # nn.Module's attributes are untyped

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, the base's own bias."""
        return self.base_layer.bias  # type: ignore[return-value]  # nn.Module's attributes are untyped

    def add(self, name: str, r: int, scaling: float, dropout: float) -> LoraAdapter:
        """A new adapter with zero factors; not active yet."""
        adapter = LoraAdapter(self.in_features, self.out_features, r, scaling, dropout, self.weight)
        self.adapters[name] = adapter
        return adapter

    def active_factors(self) -> list[LoraFactors]:
        """The factors that act now, for a fused block that computes this layer itself; empty when adapters are off."""
        found: list[LoraFactors] = []
        for adapter in active_adapters(self):
            found.append(LoraFactors(adapter.A, adapter.B, adapter.scaling, adapter.dropout if self.training else 0.0))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``, in the base's dtype."""
        factors = self.active_factors()
        if not factors:
            return self.base_layer(x)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        only = factors[0]
        if len(factors) == 1 and not only.dropout and self.is_plain(x):
            weight = self.weight
            if self.transposed and isinstance(weight, Tensor):
                weight = weight.t()
            return lora_linear(x, weight, self.bias, only.A, only.B, only.scaling)
        y: Tensor = self.base_layer(x)
        for f in factors:
            dropped = F.dropout(x, f.dropout) if f.dropout else x
            h = F.linear(dropped, f.A.to(x.dtype))
            y = y + (f.scaling * F.linear(h, f.B.to(x.dtype))).to(y.dtype)
        return y

    def is_plain(self, x: Tensor) -> bool:
        """The base layer computes ``W x + b`` and nothing else: no hook, no forward of its own, no cast on the way."""
        base = self.base_layer
        return (
            x.dtype == self.weight.dtype
            and (self.transposed or type(base).forward in (nn.Linear.forward, QuantizedLinear.forward))
            and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by the end of their PEFT key."""
        if name not in self.adapters:
            return {}
        adapter = self.adapters[name]
        assert isinstance(adapter, LoraAdapter)
        return {"lora_A.weight": adapter.A, "lora_B.weight": adapter.B}

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The base's weight with these adapters folded in: summed in float32, rounded to the base's dtype once."""
        delta = sum_of_deltas(self, names)
        if delta is None:
            return {}
        weight = as_tensor(self.weight).detach()
        return {"weight": (weight.to(delta.dtype) + (delta.t() if self.transposed else delta)).to(weight.dtype)}


class LoraEmbedding(nn.Module):
    """A frozen embedding with adapters: ``E[id] + s B A[:, id]``.

    Where an output head is tied to the embedding, the head keeps the base's matrix: the adapter acts on the input side
    only. That is what PEFT computes, and what its files mean.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx

    @property
    def weight(self) -> Tensor:
        """``[V, d]``, the base's own matrix, without the adapters."""
        return self.base_layer.weight

    def add(self, name: str, r: int, scaling: float, dropout: float) -> LoraAdapter:
        """A new adapter with zero factors; not active yet. Ids cannot be dropped: ``dropout`` does nothing."""
        adapter = LoraAdapter(self.num_embeddings, self.embedding_dim, r, scaling, 0.0, self.weight)
        self.adapters[name] = adapter
        return adapter

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...]`` int64 to ``[..., d]``, in the base's dtype."""
        y: Tensor = self.base_layer(ids)
        for adapter in active_adapters(self):
            # Rows are looked up in float32, so that their gradients add up in float32 however often a token occurs.
            h = F.embedding(ids, adapter.A.t(), padding_idx=self.padding_idx).to(y.dtype)
            y = y + scaled_like(self.base_layer, adapter.scaling * F.linear(h, adapter.B.to(y.dtype)))
        return y

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by the end of their PEFT key."""
        if name not in self.adapters:
            return {}
        adapter = self.adapters[name]
        assert isinstance(adapter, LoraAdapter)
        return {"lora_embedding_A": adapter.A, "lora_embedding_B": adapter.B}

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The matrix with these adapters folded in: summed in float32, rounded to the base's dtype once."""
        delta = sum_of_deltas(self, names)
        if delta is None:
            return {}
        weight = self.weight.detach()
        return {"weight": (weight.to(delta.dtype) + delta.t()).to(weight.dtype)}


def active_adapters(layer: LoraLinear | LoraEmbedding) -> list[LoraAdapter]:
    """The adapters of ``layer`` that act now."""
    return [layer.adapters[name] for name in layer.active]  # type: ignore[misc]  # ModuleDict's values are untyped


def sum_of_deltas(layer: LoraLinear | LoraEmbedding, names: Iterable[str]) -> Tensor | None:
    """``[out, in]`` float32, or None where none of ``names`` has factors at this layer."""
    total: Tensor | None = None
    for name in names:
        if name in layer.adapters:
            adapter = layer.adapters[name]
            assert isinstance(adapter, LoraAdapter)
            delta = adapter.delta()
            total = delta if total is None else total.add_(delta)
    return total


def scaled_like(embedding: nn.Module, y: Tensor) -> Tensor:
    """``y`` times the factor that some embeddings (Gemma's) put on their output, in ``y``'s dtype."""
    scale: Any = getattr(embedding, "embed_scale", None)
    if scale is None:
        return y
    return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
