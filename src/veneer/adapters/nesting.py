"""Which changes of a module exclude each other: layers of different kinds do not nest, replacements do not add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """Refuses a plan that changes a module in two ways, or in another way than the ``slots`` that are there already.

    Raises:
        AdapterError: names the module and the adapters.
    """
    changes: list[tuple[str, type[Slot]]] = [
        (target.path, LoraEmbedding if target.kind == "embedding" else LoraLinear) for target in plan.lora
    ]
    changes += [(stack.path, LoraExperts) for stack in plan.experts]
    for token in plan.tokens:
        changes.append((token.path, TokenEmbedding if isinstance(modules[token.path], nn.Embedding) else TokenHead))
    changes += [(path, SavedModule) for path in plan.saved]
    changes += [(path, SavedParameters) for path, _ in plan.parameters]
    kinds: dict[str, type[Slot]] = {}
    for path, kind in changes:
        if kinds.setdefault(path, kind) is not kind:
            what = f"a {type(modules[path]).__name__} cannot be changed in two ways by one adapter"
            keys = dict(plan.parameters).get(path, ())
            own = f" ({', '.join(keys)})" if keys else ""
            fix = f"remove it from modules_to_save{own}, or from target_modules, target_parameters or experts"
            raise AdapterError(what, where=path, fix=fix)
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


def check_together(names: Sequence[str], slots: Mapping[str, Slot]) -> None:
    """Refuses adapters that replace the same thing: they cannot act together.

    Raises:
        AdapterError: names the module and the adapters.
    """
    for path, slot in slots.items():
        here = [name for name in names if name in slot.adapters]
        own = [name for name in here if isinstance(slot, LoraLinear) and slot.own_codes((name,)) is not None]
        replaced: list[object] = []
        what = "this module"
        if isinstance(slot, (TokenEmbedding, TokenHead)):
            replaced = [i for name in here for i in slot.adapters[name].ids.tolist()]  # type: ignore[operator]  # untyped
            what = "the same token rows"
        elif isinstance(slot, SavedModule) or own:
            replaced = [path for _ in (own or here)]
        elif isinstance(slot, SavedParameters):
            replaced = [key for name in here for key in slot.tensors(name)]
            what = f"{', '.join(dict.fromkeys(str(k) for k in replaced if replaced.count(k) > 1))} of this module"
        if len(replaced) != len(set(replaced)):
            raise AdapterError(f"adapters {here} both replace {what}", where=path, fix="use one of them")
