"""Number formats by name, and which of them a device multiplies fastest."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import UsageError, did_you_mean
from veneer.kernels.matmul import Turned, sum_of_products
from veneer.runtime import resolve_device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUNDS = 12  # of a measurement
_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def resolve_dtype(dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it faster than float32 (measured once on a CPU), else float32.

    Raises:
        UsageError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = _ALIASES.get(dtype, dtype)
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(f"unknown dtype '{dtype}'", fix=did_you_mean(dtype, [*DTYPES, "auto"]) or "use bfloat16")
    where = resolve_device(device)
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if where.type == "cpu":
        return torch.bfloat16 if cpu_bf16_time() < 1 else torch.float32
    return torch.float32


@functools.cache
def cpu_bf16_time() -> float:
    """The time of our product in bfloat16 as a share of that in float32, on the CPU: a measurement of 50 ms.

    Where a processor has no instructions for either our way or PyTorch's, it can be hundreds of times as long (pytorch
    #146508).
    """
    ways = ((_ours, torch.bfloat16), (_theirs, torch.float32))
    for product, dtype in ways:  # what starts threads or compiles does it here
        small = torch.ones(64, 256, dtype=dtype)
        product(small, small)
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):  # in turn: what else runs on the machine slows both
        for place, (product, dtype) in enumerate(ways):
            square = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            product(square, square)
            best[place] = min(best[place], time.perf_counter() - start)
        if best[0] > 0.02:
            break
    return best[0] / best[1]


def _ours(rows: Tensor, weight: Tensor) -> Tensor:
    return sum_of_products(Turned(rows, weight))


def _theirs(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight)
