"""Whether a model fits before it is read: an estimate of what loading needs against what is free."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import nn

from veneer.errors import ModelError
from veneer.models.quantized_plan import QuantPlan
from veneer.quant import QuantConfig

IGNORE = "VENEER_IGNORE_MEMORY"  # set to 1: load all the same

# What quantising one piece, reading and transformers' own bookkeeping take besides the weights.
_WORKING = 100_000_000

# A stack of experts is put together by transformers from the experts of the file: read, stacked and joined.
_COPIES_OF_A_STACK = 3

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def check_memory(skeleton: nn.Module, plan: QuantPlan, config: QuantConfig, device: torch.device, where: str) -> None:
    """Refuses a load that would not fit. Where a system does not say what is free, nothing is refused.

    Args:
        skeleton: the model on the meta device, in the dtype that it will compute in.

    Raises:
        ModelError: says how much is missing.
    """
    if os.environ.get(IGNORE) == "1":
        return
    for place in dict.fromkeys((device, torch.device("cpu"))):
        need, free = needed_bytes(skeleton, plan, config, device, place), free_bytes(place)
        if free is not None and need > free:
            whose = "of memory" if place.type == "cpu" else f"of memory on {place}"
            raise ModelError(
                f"loading needs about {need / 1e9:.1f} GB {whose}, and {free / 1e9:.1f} GB are free: "
                f"{(need - free) / 1e9:.1f} GB are missing",
                where=where,
                fix=f"free some, quantise to fewer bits or take a smaller model; to try all the same: {IGNORE}=1",
            )


def needed_bytes(
    skeleton: nn.Module, plan: QuantPlan, config: QuantConfig, device: torch.device, place: torch.device
) -> int:
    """An estimate of what loading onto ``device`` takes in the memory of ``place`` (the device, or the host).

    The weights in codes, the others, and the largest tensor once in 16 bits and once in the dtype of the model. On the
    way to another device only the others and the largest tensor are in the host's memory.
    """
    bits = bits_per_weight(config)
    codes = plain = largest = 0.0
    for name, parameter in skeleton.named_parameters():
        size = parameter.numel()
        on_the_way = size * (2 + parameter.element_size())
        if name in plan.weights:
            codes += size * bits / 8
            on_the_way *= _COPIES_OF_A_STACK if plan.weights[name].kind == "experts" else 1
        else:
            plain += size * parameter.element_size()
        largest = max(largest, on_the_way)
    held = codes + plain if device == place else plain
    return math.ceil(held + largest + _WORKING)


def bits_per_weight(config: QuantConfig) -> float:
    """What a weight takes with its share of the scales (INT8's are one to a row: next to nothing)."""
    if config.scheme == "int8":
        return 8.0
    scales = 8 + 32 / 256 if config.double_quant else 32
    return 4 + scales / config.block_size


def free_bytes(device: torch.device) -> int | None:
    """What may still be taken there, without swapping; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [value for value in (_available(), *(_left_in_group(*paths) for paths in _CGROUPS)) if value is not None]
    return min(found, default=None)


def _available() -> int | None:
    """Linux: what can be had without swapping, the file cache included."""
    return _entry(Path("/proc/meminfo"), "MemAvailable:", 1024)


def _left_in_group(limit: str, usage: str, stat: str, cache: str) -> int | None:
    """What a container's limit leaves; its file cache can be taken back."""
    try:
        most, used = int(Path(limit).read_text()), int(Path(usage).read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return most - used + (_entry(Path(stat), cache, 1) or 0)


def _entry(path: Path, name: str, unit: int) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.split()[:1] == [name]), None)
