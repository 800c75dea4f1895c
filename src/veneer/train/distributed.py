"""Several processes under torchrun: who we are, and sums over all of us.

Only the adapter has gradients, and they lie in one buffer, so data parallelism is one all-reduce per optimizer step;
no wrapper around the module is needed. The environment is torchrun's (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR``, ``MASTER_PORT``).
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from veneer.errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes of this run; alone, every operation returns what it was given."""

    rank: int = 0
    size: int = 1
    joined: bool = False  # the process group is ours, and not the caller's

    @property
    def is_main(self) -> bool:
        """The process that writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64 on the CPU."""
        if self.size == 1:
            return list(numbers)
        total: list[float] = self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every process's JSON-able ``value``, by rank, on every process. Sent as text: nothing is pickled."""
        if self.size == 1:
            return [value]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        self.sum_(lengths)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(text)] = text
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[:length].tolist())) for part, length in zip(parts, lengths.tolist())]

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.sum_numbers([0.0])


def join_world(device: str = "cpu") -> World:
    """Joins the processes that torchrun started; without torchrun, a world of one.

    The control traffic goes over gloo even where gradients go over NCCL: a process that waits while the first one
    renders data must not run into NCCL's time limit.

    Raises:
        UsageError: torchrun's environment is incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set",
            where="environment",
            fix="start several processes with: torchrun --nproc-per-node N -m veneer train RECIPE",
        )
    joined = not dist.is_initialized()
    if joined:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    return World(rank=dist.get_rank(), size=size, joined=joined)


def leave_world(world: World) -> None:
    """Ends the process group, if :func:`join_world` began it."""
    if world.joined and dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The recipe's device for this process: under torchrun ``auto`` and ``cuda`` become this process's own GPU."""
    if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
