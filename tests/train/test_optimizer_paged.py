"""Moments that lie in host memory and visit the device are the moments that never left it, bit for bit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.train import optimizer
from veneer.train.optimizer import FlatAdamW
from veneer.train.optimizer_memory import Memory, Paged, Part, Resident, split
from veneer.train.optimizer_update import AdamW, Update, Update8bit, Update32bit

CPU = torch.device("cpu")
GROUPS = [Part(0, 2048 + 768, 0.1), Part(2048 + 768, 4096, 0.0)]
PARTS = split(GROUPS, 512)
UPDATES = [Update32bit(0.9, 0.99, 1e-8), Update8bit(0.9, 0.99, 1e-8)]


def drawn(seed: int) -> Tensor:
    return torch.randn(4096, generator=torch.Generator().manual_seed(seed))


def trained(update: Update, memory: Memory, parts: list[Part]) -> tuple[Tensor, dict[str, Tensor]]:
    flat, grad = drawn(0), torch.zeros(4096)
    adam = AdamW(flat, grad, parts, update, memory)
    for step in range(6):
        grad.copy_(drawn(1 + step))
        adam.step(0.01)
    return flat, adam.state()


def test_parts_cover_each_group_and_never_cross_its_border() -> None:
    assert [part.start for part in PARTS] == [0, 512, 1024, 1536, 2048, 2560, 2816, 3328, 3840]
    assert [part.stop - part.start for part in PARTS] == [512] * 5 + [256] + [512] * 2 + [256]
    assert [part.weight_decay for part in PARTS] == [0.1] * 6 + [0.0] * 3


@pytest.mark.parametrize("update", UPDATES, ids=["32bit", "8bit"])
def test_paged_steps_are_the_resident_ones_bit_for_bit(update: Update) -> None:
    paged, state = trained(update, Paged(update.stored, 4096, CPU, largest=512), PARTS)
    resident, expected = trained(update, Resident(update.stored, 4096, CPU), GROUPS)
    assert torch.equal(paged, resident)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@dataclass
class Event:
    done: bool = False


@dataclass
class Stream:
    """A queue of a device: what is given to it is done in order, but when, only events tell."""

    queue: list[Event | Callable[[], object]] = field(default_factory=list)

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(lambda: setattr(event, "done", True))
        return event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def run_one(self) -> bool:
        """Does the next thing, if it need not wait."""
        if not self.queue or (isinstance(self.queue[0], Event) and not self.queue[0].done):
            return False
        task = self.queue.pop(0)
        if not isinstance(task, Event):
            task()
        return True


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("update", UPDATES, ids=["32bit", "8bit"])
def test_two_streams_in_any_order_give_the_resident_steps(
    update: Update, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies and updates are queued on streams that run whenever they like: only the events keep them in order."""
    copies, compute = Stream(), Stream()
    current: list[Stream] = []
    chance = random.Random(seed)
    copy_now = Tensor.copy_

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def copy_later(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not current:
            return copy_now(target, source)
        current[-1].queue.append(lambda: copy_now(target, source))
        return target

    def drain() -> None:
        while copies.queue or compute.queue:
            first, second = chance.sample([copies, compute], 2)
            assert first.run_one() or second.run_one(), "both streams wait for ever"

    monkeypatch.setattr(Tensor, "copy_", copy_later)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    paged = Paged(update.stored, 4096, CPU, largest=512)
    paged._copies = copies  # type: ignore[assignment]  # it stands for CUDA's

    class Queued:
        """The update, queued like a kernel; everything is done when the gradient of the next step is written."""

        stored, alignment = update.stored, update.alignment

        def __call__(self, parameter: Tensor, *others: Any) -> None:
            compute.queue.append(lambda: update(parameter, *others))
            for _ in range(chance.randrange(4)):
                chance.choice([copies, compute]).run_one()

    flat, grad = drawn(0), torch.zeros(4096)
    adam = AdamW(flat, grad, PARTS, Queued(), paged)  # type: ignore[arg-type]  # looser than the protocol
    for step in range(6):
        compute.queue.append(lambda step=step: copy_now(grad, drawn(1 + step)))  # type: ignore[misc]
        adam.step(0.01)
    drain()
    monkeypatch.undo()
    expected_flat, expected = trained(update, Resident(update.stored, 4096, CPU), GROUPS)
    assert torch.equal(flat, expected_flat)
    assert all(torch.equal(paged._host[name], expected[name]) for name in paged._host)


@pytest.mark.parametrize("bits", ["", "_8bit"])
def test_on_the_cpu_paged_is_unpaged_and_says_so(bits: str) -> None:
    def run(optim: str) -> FlatAdamW:
        flat = FlatAdamW([("p", nn.Parameter(drawn(0).view(64, 64)))], optim=optim)
        for step in range(3):
            flat.grad_views[0].copy_(drawn(1 + step).view(64, 64))
            flat.step(0.01)
        return flat

    paged, unpaged = run("paged_adamw" + bits), run("adamw" + bits)
    assert torch.equal(paged.flat, unpaged.flat)
    assert "there is nothing to page" in paged.description
    assert "page" not in unpaged.description


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and streams need a CUDA device")
@pytest.mark.parametrize("bits", ["", "_8bit"])
def test_on_cuda_paged_steps_are_the_resident_ones_and_the_moments_lie_on_the_host(
    bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 1 << 14
    monkeypatch.setattr(optimizer, "PART", part)
    shape = (33, part)

    def run(optim: str) -> tuple[FlatAdamW, int]:
        generator = torch.Generator("cuda").manual_seed(0)
        named = [("p", nn.Parameter(torch.randn(shape, device="cuda", generator=generator)))]
        before = torch.cuda.memory_allocated()
        flat = FlatAdamW(named, optim=optim)
        held = torch.cuda.memory_allocated() - before - 2 * flat.flat.nbytes
        for _ in range(20):
            flat.grad.copy_(torch.randn(flat.grad.shape, device="cuda", generator=generator))
            flat.step(0.01)
        return flat, held

    (paged, held), (resident, _) = run("paged_adamw" + bits), run("adamw" + bits)
    assert torch.equal(paged.flat, resident.flat)
    states = paged.state(), resident.state()
    assert all(torch.equal(states[0][name], states[1][name].cpu()) for name in states[0])
    assert all(tensor.is_pinned() for name, tensor in states[0].items() if name != "steps")
    assert held < 0.2 * sum(tensor.nbytes for tensor in states[0].values())
