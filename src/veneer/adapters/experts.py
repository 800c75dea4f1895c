"""LoRA on the experts of a MoE layer: factors for every expert, or some, of each stack; never a dense update.

    expert e of a stack computes  W_e x + s B_e (A_e x)

Off, the layer calls its base layer and nothing else. On, it computes what the base layer computes by itself, whatever
experts implementation the base was given, with the updates in it: see :mod:`veneer.adapters.fused_experts`.
Names: ``E`` experts, ``K`` experts with factors, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.expert_files import file_factors, nesting, own_factors
from veneer.adapters.fused_experts import forward_experts, stack_names, stack_of
from veneer.adapters.init import init_linear
from veneer.adapters.layers import keep_dtype, master_dtype
from veneer.kernels.matmul import as_tensor


@dataclass(frozen=True)
class ExpertTarget:
    """One stack that gets factors."""

    path: str  # of the module
    parameter: str  # the stack's name in it
    r: int
    lora_alpha: float
    count: int  # E
    experts: tuple[int, ...] | None = None  # which ones, in order; None: all

    @property
    def name(self) -> str:
        """The path of the parameter."""
        return f"{self.path}.{self.parameter}"


class ExpertAdapter(nn.Module):
    """The factors that one adapter has at one stack.

    Args:
        shape: ``(E, out, in)`` of the stack.
        r: rank.
        scaling: factor before ``B A``.
        experts: the experts that have factors; None: all.
        dtype, device: of the factors.
    """

    def __init__(
        self,
        shape: torch.Size,
        r: int,
        scaling: float,
        experts: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.count, width_out, width_in = shape
        self.experts, self.scaling = experts, scaling
        self.positions: tuple[int, ...] | None = None  # for each of the E experts, where its factors are; -1: none
        if experts is not None:
            place = {expert: at for at, expert in enumerate(experts)}
            self.positions = tuple(place.get(expert, -1) for expert in range(self.count))
        k = self.count if experts is None else len(experts)
        self.A = nn.Parameter(torch.zeros(k, r, width_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(k, width_out, r, dtype=dtype, device=device))

    @property
    def r(self) -> int:
        return self.A.shape[1]

    def chosen(self) -> Iterable[tuple[int, int]]:
        """The experts that have factors, each with their place: ``(expert, place)``."""
        return ((expert, at) for at, expert in enumerate(range(self.count) if self.experts is None else self.experts))

    def fill(self, method: bool | str, seed: int, key: str) -> None:
        """Starts the factors, each expert's from a random stream of its own: a choice of experts changes no other's."""
        for expert, at in self.chosen():
            init_linear(self.A[at], self.B[at], method, seed, f"{key}.{expert}")

    def extra_repr(self) -> str:
        return f"experts={len(self.A)} of {self.count}, r={self.r}, scaling={self.scaling:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertAdapter:
        super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self


class LoraExperts(nn.Module):
    """Frozen experts with adapters.

    Args:
        base_layer: of a form that :func:`veneer.adapters.fused_experts.is_recognised`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()  # of ModuleDicts: by the adapter's name, then by the stack's
        self.active: tuple[str, ...] = ()

    def add(self, name: str, target: ExpertTarget, scaling: float) -> ExpertAdapter:
        """New zero factors for one stack; not active yet."""
        weight = stack_of(self.base_layer, target.parameter)
        if name not in self.adapters:
            self.adapters[name] = nn.ModuleDict()
        dtype, device = master_dtype(weight), weight.device
        adapter = ExpertAdapter(weight.shape, target.r, scaling, target.experts, dtype, device)
        self._stacks(name)[target.parameter] = adapter
        return adapter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``; see :func:`veneer.adapters.fused_experts.forward_experts`."""
        if not self.active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]  # untyped
        updates: dict[str, list[ExpertAdapter]] = {}
        for name in self.active:
            for stack, adapter in self.stacks(name).items():
                updates.setdefault(stack, []).append(adapter)
        return forward_experts(self.base_layer, hidden_states, top_k_index, top_k_weights, updates)

    def stacks(self, name: str) -> dict[str, ExpertAdapter]:
        """The factors of one adapter by stack, in the order in which the base registers its stacks."""
        if name not in self.adapters:
            return {}
        held = self._stacks(name)
        return {stack: held[stack] for stack in stack_names(self.base_layer) if stack in held}  # type: ignore[misc]  # untyped

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One adapter's factors as they are trained (``[K, r, in]``, ``[K, out, r]``), by the ends of their keys."""
        held = self.stacks(name)
        return {
            f"{prefix}lora_{letter}.weight": factor
            for prefix, adapter in zip(nesting(len(held)), held.values())
            for letter, factor in (("A", adapter.A), ("B", adapter.B))
        }

    def portable(self, name: str) -> dict[str, Tensor]:
        """The same as they stand in PEFT's file, ``[E * r, in]`` and ``[out, r * E]``: zero where there are none."""
        held = self.stacks(name)
        return {
            f"{prefix}{end}": tensor
            for prefix, adapter in zip(nesting(len(held)), held.values())
            for end, tensor in file_factors(adapter.A, adapter.B, adapter.experts, adapter.count).items()
        }

    def from_file(self, name: str, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Those tensors of ``state`` that are one adapter's here, as they are trained; ``prefix`` begins their keys."""
        held = self.stacks(name)
        return {
            key: own_factors(state[key], factor.shape, adapter.experts, adapter.count, key)
            for deeper, adapter in zip(nesting(len(held)), held.values())
            for letter, factor in (("A", adapter.A), ("B", adapter.B))
            if (key := f"{prefix}{deeper}lora_{letter}.weight") in state
        }

    @torch.no_grad()
    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The stacks with these adapters folded in, as the module has them: summed in float32, rounded once."""
        found: dict[str, list[ExpertAdapter]] = {}
        for name in names:
            for stack, adapter in self.stacks(name).items():
                found.setdefault(stack, []).append(adapter)
        base: Any = self.base_layer
        result: dict[str, Tensor] = {}
        for stack, adapters in found.items():
            folded = as_tensor(stack_of(base, stack)).detach().clone()
            for expert in range(len(folded)):
                total = folded[expert].to(master_dtype(folded))
                for adapter in adapters:
                    at = expert if adapter.positions is None else adapter.positions[expert]
                    if at >= 0:
                        total.addmm_(adapter.B[at], adapter.A[at], alpha=adapter.scaling)
                folded[expert] = total
            result[stack] = (folded.mT if base.is_transposed else folded).contiguous()
        return result

    def _stacks(self, name: str) -> nn.ModuleDict:
        return self.adapters[name]  # type: ignore[return-value]  # ModuleDict's values are untyped
