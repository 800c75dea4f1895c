"""Where the optimizer's state lies: on the device, or in host memory with parts of it visiting the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of the optimizer's state: an entry of it stands for ``per`` elements of the buffer."""

    dtype: torch.dtype
    per: int = 1


class Part(NamedTuple):
    """Elements ``start`` to ``stop`` of the flat buffer, their weight decay, and what their learning rate is times."""

    start: int
    stop: int
    weight_decay: float
    multiplier: float = 1.0


def split(groups: Sequence[Part], size: int) -> list[Part]:
    """The groups in parts of at most ``size`` elements."""
    return [
        group._replace(start=start, stop=min(start + size, group.stop))
        for group in groups
        for start in range(group.start, group.stop, size)
    ]


class Memory(Protocol):
    """Holds the tensors of a state for a buffer; :meth:`visit` hands them out part by part, on the device."""

    def visit(self, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, Tensor]]]:
        """Each part with its entries of every tensor; what is written into them until the next one is kept."""

    def tensors(self) -> dict[str, Tensor]:
        """The state itself, not a copy, with all earlier updates in it."""


class Resident:
    """The state lies on the device of the parameters."""

    def __init__(self, stored: Mapping[str, Stored], elements: int, device: torch.device) -> None:
        self._stored = stored
        self._tensors = {
            name: torch.zeros(elements // kind.per, dtype=kind.dtype, device=device) for name, kind in stored.items()
        }

    def visit(self, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, Tensor]]]:
        """See :class:`Memory`."""
        for part in parts:
            yield part, _entries(self._tensors, self._stored, part.start, part.stop)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Memory`."""
        return dict(self._tensors)


class Paged:
    """The state lies in pinned host memory, and each part of it comes to the device, is updated, and goes back.

    Two slots on the device take turns, and the copies have a stream of their own, so that they run while the part
    between them is updated:

        copies    in 0, in 1,           out 0, in 2,           out 1, in 3, ...
        update                0,                     1,                     2, ...

    An update waits for its copy in, a copy out for its update. A slot is filled again only after it was emptied, and a
    step's copies in come after the copies out of the step before, because all copies are on the one stream.

    On the CPU (for tests: there is nothing to gain) the same happens without a stream.

    Args:
        elements: of the flat buffer.
        largest: elements of the largest part that will be visited.
    """

    def __init__(self, stored: Mapping[str, Stored], elements: int, device: torch.device, largest: int) -> None:
        cuda = device.type == "cuda"
        self._stored = stored
        self._device = device
        self._host = {
            name: torch.zeros(elements // kind.per, dtype=kind.dtype, pin_memory=cuda) for name, kind in stored.items()
        }
        self._slots = [
            {name: torch.empty(largest // kind.per, dtype=kind.dtype, device=device) for name, kind in stored.items()}
            for _ in range(2)
        ]
        self._copies = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]  # torch leaves it so

    def visit(self, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, Tensor]]]:
        """See :class:`Memory`."""
        compute = torch.cuda.current_stream(self._device) if self._copies is not None else None
        if self._copies is not None and compute is not None:
            # The memory of the slots may have served work before them that is still queued.
            self._copies.wait_stream(compute)
        coming = self._bring(0, parts[0])
        for number, part in enumerate(parts):
            arrived = coming
            if number + 1 < len(parts):
                coming = self._bring(number + 1, parts[number + 1])
            if compute is not None and arrived is not None:
                compute.wait_event(arrived)
            yield part, _entries(self._slots[number % 2], self._stored, 0, part.stop - part.start)
            self._send_back(number, part, compute)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Memory`."""
        if self._copies is not None:
            self._copies.synchronize()
        return dict(self._host)

    def _bring(self, number: int, part: Part) -> torch.cuda.Event | None:
        """Copies a part into its slot; the event says when it is there."""
        slot = _entries(self._slots[number % 2], self._stored, 0, part.stop - part.start)
        with self._on_copies():
            for name, entries in _entries(self._host, self._stored, part.start, part.stop).items():
                slot[name].copy_(entries, non_blocking=True)
        return self._copies.record_event() if self._copies is not None else None

    def _send_back(self, number: int, part: Part, compute: torch.cuda.Stream | None) -> None:
        """Copies a part back to the host when what ``compute`` has been given until now is done."""
        slot = _entries(self._slots[number % 2], self._stored, 0, part.stop - part.start)
        if self._copies is not None and compute is not None:
            self._copies.wait_event(compute.record_event())
        with self._on_copies():
            for name, entries in _entries(self._host, self._stored, part.start, part.stop).items():
                entries.copy_(slot[name], non_blocking=True)

    def _on_copies(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies) if self._copies is not None else nullcontext()


def _entries(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], start: int, stop: int) -> dict[str, Tensor]:
    """The entries of each tensor for the elements ``start`` to ``stop``, as views."""
    return {name: tensors[name][start // kind.per : stop // kind.per] for name, kind in stored.items()}
