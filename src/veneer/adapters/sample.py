"""The rows that a start looks at, and the layers that it starts: what EVA and LoRA-GA share.

What they collect is dense, ``[in, in]`` or ``[out, in]`` per layer: as many layers as fit into a budget of memory are
watched at a time, and the batches are gone over again for the others. So the result is exact, whatever the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from veneer.adapters.config import LoraConfig
from veneer.adapters.layers import LoraAdapter, LoraLinear
from veneer.adapters.model import AdaptedModel
from veneer.adapters.slots import slots
from veneer.adapters.watch import Layers
from veneer.errors import AdapterError

Batch = TypeVar("Batch")
Counted = Callable[[Batch], Tensor | None]


@dataclass(frozen=True)
class Sample(Generic[Batch]):
    """An adapter that waits for data, and the data.

    Attributes:
        adapted: the model; ``name``: the adapter.
        layers: its linears by path; those that share their factors together.
        batches, loss, counted, memory_budget: see :func:`veneer.adapters.init_data.initialise_from`.
    """

    adapted: AdaptedModel
    name: str
    layers: Layers
    batches: Sequence[Batch]
    loss: Callable[[Batch], Tensor]
    counted: Counted[Batch]
    memory_budget: int

    @property
    def config(self) -> LoraConfig:
        return self.adapted.configs[self.name]

    def factors(self, path: str) -> LoraAdapter:
        """The adapter's factors at a layer."""
        adapter = dict(slots(self.adapted.module))[path].adapters[self.name]
        assert isinstance(adapter, LoraAdapter)
        return adapter

    def groups(self, sizes: Mapping[str, int]) -> Iterator[list[str]]:
        """The paths in order, as many at a time as fit into the budget of bytes, and at least one."""
        group: list[str] = []
        total = 0
        for path, size in sizes.items():
            if group and total + size > self.memory_budget:
                yield group
                group, total = [], 0
            group.append(path)
            total += size
        if group:
            yield group

    def rest(self, started: Collection[str]) -> str:
        """What there is to say of the layers that no row reached.

        Raises:
            AdapterError: none was reached.
        """
        if not started:
            raise AdapterError(
                "no row of data reached a layer of this adapter",
                where=f"adapter {self.name!r}",
                fix="the loss has to run the model that the adapter is on",
            )
        left = [path for path in self.layers if path not in started]
        return f"; {len(left)} layers that no row reached start as by default ({left[0]})" if left else ""


def layers_of(adapted: AdaptedModel, name: str) -> dict[str, list[LoraLinear]]:
    """The linears of an adapter; those that share their factors together."""
    found: dict[int, tuple[str, list[LoraLinear]]] = {}
    for path, slot in slots(adapted.module):
        if isinstance(slot, LoraLinear) and name in slot.adapters:
            found.setdefault(id(slot.adapters[name]), (path, []))[1].append(slot)
    return dict(found.values())
