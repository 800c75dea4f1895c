"""Which changes of a module exclude each other: layers of different kinds do not nest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from veneer.adapters.experts import LoraExperts
from veneer.adapters.layers import LoraEmbedding, LoraLinear
from veneer.adapters.saved import SavedModule
from veneer.adapters.saved_parameters import SavedParameters
from veneer.adapters.slots import Slot
from veneer.adapters.targets import Plan, inside
from veneer.adapters.tokens import TokenEmbedding, TokenHead
from veneer.errors import AdapterError


def check_places(plan: Plan, modules: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> None:
    """Refuses a plan that changes a module in another way than the ``slots`` that are there already.

    Raises:
        AdapterError: names the module and the adapters.
    """
    kinds: dict[str, type[Slot]] = {}
    for target in plan.lora:
        kinds[target.path] = LoraEmbedding if target.kind == "embedding" else LoraLinear
    kinds.update(dict.fromkeys((stack.path for stack in plan.experts), LoraExperts))
    for token in plan.tokens:
        kinds[token.path] = TokenEmbedding if isinstance(modules[token.path], nn.Embedding) else TokenHead
    kinds.update(dict.fromkeys(plan.saved, SavedModule))
    kinds.update((path, SavedParameters) for path, _ in plan.parameters)
    fix = "give both adapters the same kind of change there, or take the other one off first"
    for path, kind in kinds.items():
        for other, slot in slots.items():
            holds = kind is SavedParameters and inside(other, (path,))
            holds |= isinstance(slot, SavedParameters) and inside(path, (other,))
            if path != other and holds:
                continue  # what holds parameters may have other slots inside
            apart = path != other and not inside(path, (other,)) and not inside(other, (path,))
            if not apart and not (path == other and isinstance(slot, kind)):
                names = ", ".join(slot.adapters)
                raise AdapterError(f"adapter '{names}' changes this module in another way", where=other, fix=fix)
