"""Which experts a sample of data activates, and the choice of those that get factors (``experts: top-K``).

Wang et al. 2024 ("Let the Expert Stick to His Last"): a task uses few of the experts, and training those is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapters.config import LoraConfig
from veneer.adapters.expert_targets import check_top_k, fused_experts, top_k
from veneer.adapters.slots import base_modules
from veneer.errors import AdapterError

BatchT = TypeVar("BatchT")
_SHOWN = 8  # experts of a layer that the table names


@dataclass(frozen=True)
class ActivationTable:
    """How often each expert was chosen, by the path of its layer; ``print`` it."""

    counts: Mapping[str, tuple[int, ...]]  # [E] for each layer

    def most(self, layer: str, k: int) -> tuple[int, ...]:
        """The ``k`` most activated experts of a layer, in the order of their indices; of equals the first ones."""
        counts = self.counts[layer]
        return tuple(sorted(sorted(range(len(counts)), key=lambda e: (-counts[e], e))[:k]))

    def share(self, layer: str, experts: Iterable[int]) -> float:
        """The share of a layer's activations that these experts have."""
        counts = self.counts[layer]
        return sum(counts[e] for e in experts) / max(sum(counts), 1)

    def __str__(self) -> str:
        lines = []
        for layer, counts in self.counts.items():
            total = max(sum(counts), 1)
            first = sorted(range(len(counts)), key=lambda e: (-counts[e], e))[:_SHOWN]
            shares = ", ".join(f"{e}: {100 * counts[e] / total:.1f} %" for e in first)
            rest = f", and {len(counts) - len(first)} more" if len(counts) > len(first) else ""
            unused = sum(count == 0 for count in counts)
            lines.append(f"{layer}: {shares}{rest}" + (f" ({unused} never)" if unused else ""))
        return "\n".join(lines)


@torch.no_grad()
def count_activations(
    module: nn.Module, batches: Iterable[BatchT], run: Callable[[BatchT], object] | None = None
) -> ActivationTable:
    """Runs a model over a sample and counts the choices of its routers.

    Args:
        module: with experts that are recognised; it may be adapted.
        batches: what ``run`` takes: by default input ids ``[B, T]``, or a model's keyword arguments; tokens whose
            ``attention_mask`` ``[B, T]`` is zero are not counted.
        run: calls the model.

    Raises:
        AdapterError: the model has no such experts, or there was no token.
    """
    layers = fused_experts(base_modules(module))
    counts = {path: torch.zeros(count, dtype=torch.int64) for path, count in layers.items()}
    mask: Tensor | None = None

    def counter(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = (args[1] if len(args) > 1 else kwargs["top_k_index"]).detach()
            rows = index.reshape(-1, index.shape[-1])
            chosen = rows if mask is None else rows[mask.to(rows.device)]
            size = len(counts[path])
            counts[path] += torch.bincount(chosen.flatten().clamp(max=size), minlength=size + 1)[:size].cpu()

        return count

    with ExitStack() as stack:
        for path in layers:
            hook = module.get_submodule(path).register_forward_pre_hook(counter(path), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            arguments: Any = batch
            mask = arguments.get("attention_mask") if isinstance(arguments, Mapping) else None
            mask = None if mask is None else mask.reshape(-1).bool()
            if run is not None:
                run(batch)
            elif isinstance(arguments, Mapping):
                module(**arguments)
            else:
                module(arguments)
    if not any(count.any() for count in counts.values()):
        what = "no expert was activated" if layers else "the base has no fused experts"
        fix = "give a batch with tokens" if layers else "set experts: none"
        raise AdapterError(what, where="count_activations", fix=fix)
    return ActivationTable({path: tuple(count.tolist()) for path, count in counts.items()})


def choose_experts(
    module: nn.Module, config: LoraConfig, batches: Iterable[BatchT], run: Callable[[BatchT], object] | None = None
) -> tuple[LoraConfig, ActivationTable]:
    """A config whose ``experts: top-K`` is replaced by the experts that a sample activates most, layer by layer.

    Args:
        batches, run: see :func:`count_activations`.

    Returns:
        The config, and the table by which it was chosen.

    Raises:
        AdapterError: ``experts`` is no ``top-K``, or K is more than a layer has; nothing is run then.
    """
    k = top_k(config.experts)
    if k is None:
        fix = "set experts: top-K, for example top-8"
        raise AdapterError(f"experts: {config.experts} needs no counting", where="LoraConfig.experts", fix=fix)
    layers = fused_experts(base_modules(module))
    for count in layers.values():
        check_top_k(k, count)
    table = count_activations(module, batches, run)
    return dataclasses.replace(config, experts={layer: table.most(layer, k) for layer in layers}), table
