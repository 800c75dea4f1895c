"""The machine: device, threads, seeds, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch

from veneer.errors import UsageError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        UsageError: the device is unknown or not on this machine.
    """
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{device}'", fix="use auto, cpu, cuda, cuda:0 or mps") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device on this machine", where=f"device: {device}", fix="use device: cpu")
    return resolved


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (every device)."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of torch's generators, as tensors (Python's and NumPy's are never drawn from)."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            state[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    for key, value in state.items():
        if key.startswith("cuda.") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, int(key.removeprefix("cuda.")))


# glibc's; other libraries give back by themselves, or not at all.
_malloc_trim, _mallopt = (
    getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None for name in ("malloc_trim", "mallopt")
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_ON_HEAP = 32 * 2**20  # where glibc's own threshold ends up, once large tensors have come and gone


def trim_heap() -> None:
    """Gives freed memory, which the C library keeps for itself in pieces, back to the system."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def release_memory() -> None:
    """Drops what only circles hold, and gives it back to the system."""
    gc.collect()
    trim_heap()


@contextlib.contextmanager
def leaving_no_gaps() -> Iterator[None]:
    """While it is open, memory from 64 KB on is mapped by itself, and back with the system as soon as it is freed.

    Slower, but what comes after finds a heap without gaps: an adapter's start from data takes other sizes than a step,
    and what small things pin of its memory a step cannot use (EVA on SmolLM2: 0.12 of 1.70 GB).
    """
    with _thresholds(2**16, 2 * _LARGEST_ON_HEAP):
        yield


@contextlib.contextmanager
def holding_heap() -> Iterator[None]:
    """While it is open, freed memory stays with the process: every step needs it again, page by page.

    At its end all of it goes back to the system.
    """
    with _thresholds(_LARGEST_ON_HEAP, -1):
        yield
    trim_heap()


@contextlib.contextmanager
def _thresholds(mapped: int, trimmed: int) -> Iterator[None]:
    """Other sizes from which memory is mapped by itself, and freed memory at the heap's end is given back."""
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, mapped)
        _mallopt(_M_TRIM_THRESHOLD, trimmed)
    try:
        yield
    finally:
        if _mallopt is not None:
            _mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
            _mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_ON_HEAP)


def keep_few_products() -> None:
    """Lets oneDNN keep the code of 256 matrix products instead of 1,024, where the environment does not say.

    It makes code for every shape, a third of a megabyte of it. Packed rows hardly ever have the lengths of an earlier
    step, so that most of what it keeps is never used again; one step needs less than 200. To be called before the first
    product of the process, which reads the setting.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def peak_rss_gb() -> float:
    """The most resident memory this process has held so far, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def hardware() -> dict[str, Any]:
    """What a run folder records about the machine."""
    info: dict[str, Any] = {"cpu_threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    if hasattr(os, "sysconf"):
        info["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info
