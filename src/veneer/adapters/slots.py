"""The places where adapters sit in a model, seen as one kind of thing; and the base model seen through them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer.adapters.experts import LoraExperts
from veneer.adapters.layers import LoraEmbedding, LoraLinear
from veneer.adapters.saved import SavedModule
from veneer.adapters.saved_parameters import SavedParameters
from veneer.adapters.tokens import TokenEmbedding, TokenHead

# Each has base_layer, adapters, active, tensors(name) and merged(names).
Slot = LoraLinear | LoraEmbedding | LoraExperts | TokenEmbedding | TokenHead | SavedModule | SavedParameters
SLOTS = (LoraLinear, LoraEmbedding, LoraExperts, TokenEmbedding, TokenHead, SavedModule, SavedParameters)


def base_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The base's modules by path, parents first, as if no adapter were there; a shared module under its first path."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if isinstance(module, SLOTS):
            module = module.base_layer
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, SavedParameters):
                visit(f"{path}.{name}" if path else name, child)

    visit("", root)
    return found


def slots(root: nn.Module) -> Iterator[tuple[str, Slot]]:
    """The slots of ``root`` with their paths in the base: for parameters that of the module that holds them."""
    for path, module in root.named_modules():
        if isinstance(module, SLOTS):
            yield (path.rpartition(".")[0] if isinstance(module, SavedParameters) else path), module


def take_off(slot: Slot, hanging: list[tuple[nn.Module, str]]) -> None:
    """Puts the base's own module back into the place of a slot, wherever it hangs."""
    if isinstance(slot, SavedParameters):
        slot.take_off()
        return
    for parent, attribute in hanging:
        setattr(parent, attribute, slot.base_layer)


def places(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module hangs, by its id: ``(parent, name)``; several for a shared module."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found
