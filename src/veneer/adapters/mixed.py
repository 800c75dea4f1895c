"""One batch, several adapters: each row as if it ran alone with its own.

    y_i = f(x_i; adapter n_i)        for row i of the batch

While the model runs, each place of an adapter runs once for every adapter that the batch names, on that adapter's rows.
Names: ``B`` rows, ``S`` tokens of a row, ``T = B S``.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.experts import LoraExperts
from veneer.adapters.layers import LoraLinear
from veneer.adapters.saved_parameters import SavedParameters
from veneer.adapters.slots import Slot, base_modules
from veneer.adapters.structure import is_read, language_tower
from veneer.errors import AdapterError

BASE = "__base__"  # names no adapter: such a row is the base's
_ALONE = "run these rows in a batch of their own, after use(name)"


@contextlib.contextmanager
def mixed_rows(
    root: nn.Module, slots: Mapping[str, Slot], names: Sequence[str], is_off: Callable[[], bool]
) -> Iterator[None]:
    """Within it, every call of ``root`` with ``len(names)`` rows takes row ``i`` through the adapter ``names[i]``.

    Args:
        slots: all places of adapters in ``root``, by path.
        names: of adapters, or :data:`BASE`.
        is_off: asked at each layer: whether the adapters are switched off for the moment.

    Raises:
        AdapterError: rows cannot be told apart at one of the slots.
    """
    if is_mixed(root):
        raise AdapterError("this model takes mixed batches already", where="mixed batch", fix="leave that one first")
    _check(root, slots, names)
    rows = _Rows(names)
    hooks = (
        root.register_forward_pre_hook(rows.begin, with_kwargs=True),
        root.register_forward_hook(rows.end, always_call=True),
    )

    def forward(slot: Slot, *args: Any, **kwargs: Any) -> Any:
        del slot.__dict__["forward"]  # what runs here is the slot's own
        before = slot.active
        try:
            return slot(*args, **kwargs) if is_off() else rows.through(slot, *args, **kwargs)
        finally:
            slot.active = before
            slot.__dict__["forward"] = types.MethodType(forward, slot)

    for slot in slots.values():
        slot.active = ()
        slot.__dict__["forward"] = types.MethodType(forward, slot)
    try:
        yield
    finally:
        for slot in slots.values():
            del slot.__dict__["forward"]
        for hook in hooks:
            hook.remove()


def is_mixed(root: nn.Module) -> bool:
    """Whether ``root`` is within :func:`mixed_rows`."""
    return any(isinstance(getattr(hook, "__self__", None), _Rows) for hook in root._forward_pre_hooks.values())


def _check(root: nn.Module, slots: Mapping[str, Slot], names: Sequence[str]) -> None:
    modules = base_modules(root)
    tower = language_tower(modules)
    for path, slot in slots.items():
        if not any(name in slot.adapters for name in names):
            continue
        owner, _, last = path.rpartition(".")
        why = ""
        if isinstance(slot, SavedParameters):
            why = "trains parameters that this module reads itself"
        elif isinstance(slot, LoraLinear) and is_read(modules[owner], last):
            why = "changes a weight that another module reads"
        elif "experts" in path.split(".")[:-1] and not isinstance(slot, LoraExperts):
            why = "acts within an expert, which gets tokens of all rows"
        elif tower and path != tower and not path.startswith(f"{tower}.") and "." in path:
            why = f"acts outside of the language model {tower}"
        if why:
            name = next(name for name in names if name in slot.adapters)
            raise AdapterError(f"adapter '{name}' cannot share a batch: it {why}", where=path, fix=_ALONE)


class _Rows:
    """Whose row is whose, and the shape of the batch on its way."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.tokens: int | None = None  # of a row; None while no batch is on its way

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
        first = next((value for value in given if isinstance(value, Tensor)), None)
        if first is None or len(first) != len(self.names):
            count = "no tensor" if first is None else f"{len(first)} rows"
            raise AdapterError(
                f"the batch has {count}, and {len(self.names)} adapters are named for it",
                where="mixed batch",
                fix="name one adapter for each row, in their order",
            )
        has_tokens = first.dim() > 2 or (first.dim() == 2 and not first.is_floating_point())
        self.tokens = first.shape[1] if has_tokens else 1

    def end(self, *_: Any) -> None:
        self.tokens = None

    def through(self, slot: Slot, *args: Any, **kwargs: Any) -> Any:
        """What ``slot`` gives for rows of several adapters, each row by its own."""
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            groups.setdefault(name if name in slot.adapters else BASE, []).append(row)
        if len(groups) == 1:
            return _one(slot, next(iter(groups)), args, kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        count, each = len(tensors[0]), self._tokens_of(tensors[0])
        if each is None or any(len(tensor) != count for tensor in tensors):
            raise _unknown(slot, "gets", tensors, self.names)
        places = torch.arange(count, device=tensors[0].device).view(len(self.names), each)
        outputs: list[Any] = []
        for name, rows in groups.items():
            at = places[rows].flatten()
            mine = [value[at] if isinstance(value, Tensor) else value for value in args]
            named = {key: value[at] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            outputs.append(_one(slot, name, mine, named))

        def joined(parts: Sequence[Tensor]) -> Tensor:
            """The outputs of all groups (a router may give a row's tokens side by side) in the order of the batch."""
            counts = [len(rows) for rows in groups.values()]
            per_row = len(parts[0]) // counts[0]
            if per_row not in (each, self.tokens) or [len(part) for part in parts] != [n * per_row for n in counts]:
                raise _unknown(slot, "gives", parts, self.names)
            by_row = [part.view(n, per_row, *part.shape[1:]) for n, part in zip(counts, parts)]
            order = torch.tensor([row for rows in groups.values() for row in rows], device=parts[0].device)
            return torch.cat(by_row)[order.argsort()].flatten(0, 1)

        if isinstance(outputs[0], Tensor):
            return joined(outputs)
        return type(outputs[0])(joined(parts) for parts in zip(*outputs))

    def _tokens_of(self, x: Tensor) -> int | None:
        """How many of the first dimension of ``x`` belong to a row of the batch; None if that is not known."""
        if self.tokens is None:
            return None
        if len(x) == len(self.names):
            return 1
        return self.tokens if x.dim() == 2 and len(x) == self.tokens * len(self.names) else None


def _one(slot: Slot, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    slot.active = () if name == BASE else (name,)
    return slot(*args, **kwargs)


def _unknown(slot: Slot, verb: str, tensors: Sequence[Tensor], names: Sequence[str]) -> AdapterError:
    what, shapes = type(slot.base_layer).__name__, ", ".join(str(list(tensor.shape)) for tensor in tensors)
    return AdapterError(
        f"rows cannot be told apart: {what} {verb} {shapes} of a batch of {len(names)} rows",
        where="mixed batch",
        fix="call the model itself, without packing; or " + _ALONE,
    )
