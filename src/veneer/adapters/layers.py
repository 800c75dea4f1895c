"""The adapted layers: a frozen base layer and one object per adapter.

    y = g (W x + s B' (A' dropout(x))) + b        (Hu et al. 2021, eq. 3, with g = 1, A' = A and B' = B)

What A', B' and g are is up to the variants of the adapter. Several active adapters add up what each changes. With none
active, a layer calls its base layer and nothing else, so that adapter off is the base bit for bit.
Names: ``T`` rows (all leading dimensions flattened), ``r`` rank, ``V`` vocabulary, ``d`` width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.dora import KEY as MAGNITUDE
from veneer.adapters.row_norm import square_norms
from veneer.adapters.variant import Variant
from veneer.kernels.dropout import Dropout
from veneer.kernels.frozen import has_own_forward
from veneer.kernels.lora_linear import lora_linear
from veneer.kernels.matmul import Turned, Weight, as_tensor, sum_of_products
from veneer.quant import QuantizedLinear


@dataclass(frozen=True)
class LoraFactors:
    """The trained layer over one linear, ``W x + scaling * B (A x)``, as it acts right now."""

    A: Tensor  # [r, in]   down projection
    B: Tensor  # [out, r]  up projection, zero at the start
    scaling: float  # alpha / r, or alpha / sqrt(r) with rank stabilisation
    dropout: float  # on the input of A; 0.0 outside of training
    row_scale: Tensor | None = None  # [out] float32: factor of each output before the bias; None for ones


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


def is_plain(linear: nn.Module, x: Tensor, transposed: bool = False) -> bool:
    """A linear computes ``W x + b`` for ``x`` and nothing else: no hook, no forward of its own, no cast on the way."""
    weight: Any = getattr(linear, "weight", None)
    return (
        (transposed or type(linear).forward in (nn.Linear.forward, QuantizedLinear.forward))
        and x.dtype == weight.dtype
        and not has_own_forward(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
        and not torch.is_autocast_enabled(x.device.type)
    )


class LoraAdapter(nn.Module):
    """The factors that one adapter has at one layer.

    Args:
        width_in: columns of A (an embedding: its vocabulary).
        width_out: rows of B.
        r: rank.
        scaling: factor before ``B A``.
        dropout: probability of dropping an element of A's input while training.
        like: a tensor of the base layer: gives the device, and the dtype through :func:`master_dtype`.
        variants: what acts beside plain LoRA, in the order in which it changes the factors.
    """

    A: Tensor  # a parameter; a buffer where it is frozen
    B: Tensor
    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        width_in: int,
        width_out: int,
        r: int,
        scaling: float,
        dropout: float,
        like: Weight,
        variants: tuple[Variant, ...] = (),
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(r, width_in, dtype=master_dtype(like), device=like.device))
        self.B = nn.Parameter(torch.zeros(width_out, r, dtype=master_dtype(like), device=like.device))
        self.scaling, self.dropout, self.variants = scaling, dropout, variants
        self.E: nn.Parameter | None = None  # [r, 1], the singular values of AdaLoRA
        self.magnitude: nn.Parameter | None = None  # [out] float32, of DoRA
        self.own: QuantizedLinear | None = None  # codes that act in place of the base's, of LoftQ
        self.norm: tuple[object, Tensor] | None = None  # DoRA's row norms, and what they were computed from

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A' [k, in]`` and ``B' [out, k]`` as they act; differentiable."""
        A, B = self.A, self.B
        for variant in self.variants:
            A, B = variant.factors(self, A, B)
        return A, B

    def row_scale(self, layer: LoraLinear) -> Tensor | None:
        """``g [out]``, the factor of each output before the bias; differentiable."""
        for variant in self.variants:
            scale = variant.row_scale(self, layer)
            if scale is not None:
                return scale
        return None

    @torch.no_grad()
    def delta(self) -> Tensor:
        """``[out, in]``, the dense ``s B' A'`` in the factors' dtype, float32: 16 bits would lose small entries."""
        A, B = self.factors()
        return self.scaling * (B @ A)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the adapter at a linear, trained and kept, by the end of their key."""
        found = {"lora_A.weight": self.A, "lora_B.weight": self.B}
        for variant in self.variants:
            found |= variant.tensors(self)
        return found

    @torch.no_grad()
    def portable(self) -> dict[str, Tensor]:
        """What acts, as PEFT's file has it: the plain factors ``A'`` and ``B'``, and DoRA's magnitude."""
        A, B = self.factors()
        for variant in self.variants:
            A, B = variant.portable(self, A, B)
        own = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {"lora_A.weight": A, "lora_B.weight": B, **own}

    def extra_repr(self) -> str:
        names = "".join(f", {type(variant).__name__.lower()}" for variant in self.variants)
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}{names}"

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
        self.followed: set[str] = set()  # adapters that belong to another layer with the same weight
        self.transposed = transposed
        self._square_norm: tuple[object, Tensor] | None = None
        rows, columns = self.weight.shape
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)

    @property
    def weight(self) -> Weight:
        """The frozen weight that acts: the base's own, perhaps in codes, unless an active adapter brings codes."""
        return self._weight_of(self.active)

    def _weight_of(self, names: Iterable[str]) -> Weight:
        own = self.own_codes(names)
        return self.base_layer.weight if own is None else own.weight  # type: ignore[return-value]  # nn.Module's attributes are untyped

    def own_codes(self, names: Iterable[str]) -> QuantizedLinear | None:
        """What stands in for the base's codes in one of these adapters, computing in the base's dtype."""
        for name in names:
            own: Any = self.adapters[name].own if name in self.adapters else None
            if own is not None:
                own.compute_dtype = self.base_layer.compute_dtype
                return own  # type: ignore[no-any-return]  # ModuleDict's values are untyped
        return None

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, the base's own bias."""
        return self.base_layer.bias  # type: ignore[return-value]  # nn.Module's attributes are untyped

    def add(self, name: str, r: int, scaling: float, dropout: float, variants: tuple[Variant, ...] = ()) -> LoraAdapter:
        """A new adapter with zero factors; not active yet. Its variants start when the factors are filled."""
        adapter = LoraAdapter(self.in_features, self.out_features, r, scaling, dropout, self.weight, variants)
        self.adapters[name] = adapter
        return adapter

    def follow(self, name: str, adapter: LoraAdapter) -> None:
        """Takes the adapter of another layer with the same weight: one set of factors, two places where they act."""
        self.adapters[name] = adapter
        self.followed.add(name)

    def start(self, name: str) -> None:
        """Gives an adapter, its factors filled, what its variants need beside them."""
        if name in self.followed:
            return
        adapter = self.adapters[name]
        assert isinstance(adapter, LoraAdapter)
        for variant in adapter.variants:
            variant.start(adapter, self)

    def rows(self) -> Tensor:
        """``[out, in]`` float32 (float64 of float64): the base's own weight as plain numbers."""
        plain = as_tensor(self.weight).detach()
        plain = plain.t() if self.transposed and isinstance(self.weight, Tensor) else plain
        return plain.to(master_dtype(plain))

    def images(self, rows: Tensor) -> Tensor:
        """``rows [n, in]`` in the weight's dtype to ``W rows^T [out, n]``, without bias; outside of autograd."""
        weight = self.weight
        if isinstance(weight, Tensor):  # for few rows this is the faster way round
            return (weight.t() if self.transposed else weight) @ rows.t()
        return sum_of_products(Turned(rows, weight)).t()

    def square_norm(self) -> tuple[object, Tensor]:
        """What names the weight that acts, and ``[out]`` float32: the squares of the norms of its rows, kept for it."""
        weight = self.weight
        held = weight if isinstance(weight, Tensor) else weight.codes  # type: ignore[attr-defined]  # a QuantizedTensor
        key = held.data_ptr(), held._version, held.device
        if self._square_norm is None or self._square_norm[0] != key:
            self._square_norm = key, square_norms(weight, self.transposed)
        return self._square_norm

    def active_factors(self) -> list[LoraFactors]:
        """The factors that act now, for a fused block that computes this layer itself; empty when adapters are off."""
        found: list[LoraFactors] = []
        for adapter in active_adapters(self):
            dropout = adapter.dropout if self.training else 0.0
            found.append(LoraFactors(*adapter.factors(), adapter.scaling, dropout, adapter.row_scale(self)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``, in the base's dtype."""
        factors = self.active_factors()
        if not factors:
            return self.base_layer(x)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        only = factors[0]
        if len(factors) == 1 and self.is_plain(x):
            weight = self.weight
            if self.transposed and isinstance(weight, Tensor):
                weight = weight.t()
            drop = Dropout.drawn(only.dropout)
            return lora_linear(x, weight, self.bias, only.A, only.B, only.scaling, only.row_scale, drop)
        own = self.own_codes(self.active)
        base: Tensor = self.base_layer(x) if own is None else own(x)
        y = base
        for f in factors:
            drop = Dropout.drawn(f.dropout)
            dropped = x if drop is None else drop(x)
            h = F.linear(dropped, f.A.to(x.dtype))
            change = (f.scaling * F.linear(h, f.B.to(x.dtype))).to(y.dtype)
            if f.row_scale is not None:
                # g (W x + c) is W x + c + (g - 1) (W x + c); near 1, g itself has few digits in 16 bits.
                plain = base if self.bias is None else base - self.bias
                change = change + (f.row_scale - 1).to(y.dtype) * (plain + change)
            y = y + change
        return y

    def is_plain(self, x: Tensor) -> bool:
        """It adds its adapters to ``W x + b`` and does nothing else: no hook, no other forward, no cast on the way."""
        return not has_own_forward(self) and is_plain(self.base_layer, x, self.transposed)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by the end of their PEFT key; none for factors that belong to another layer."""
        if name not in self.adapters or name in self.followed:
            return {}
        adapter = self.adapters[name]
        assert isinstance(adapter, LoraAdapter)
        return adapter.tensors()

    def portable(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter as they stand in PEFT's file."""
        if name not in self.adapters:
            return {}
        adapter = self.adapters[name]
        assert isinstance(adapter, LoraAdapter)
        return adapter.portable()

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The base's weight with these adapters folded in: summed in float32, rounded to the base's dtype once."""
        adapters: list[LoraAdapter] = [self.adapters[name] for name in names if name in self.adapters]  # type: ignore[misc]  # untyped
        if not adapters:
            return {}
        weight = as_tensor(self._weight_of(names)).detach()
        total = weight.to(master_dtype(weight), copy=True)
        plain = total.t() if self.transposed else total  # a view: [out, in]
        rows = plain.clone() if any(adapter.row_scale(self) is not None for adapter in adapters) else plain
        for adapter in adapters:
            change = adapter.delta()
            scale = adapter.row_scale(self)
            if scale is not None:
                change += (scale.detach() - 1)[:, None] * (rows + change)
            plain += change
        return {"weight": total.to(weight.dtype)}


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
