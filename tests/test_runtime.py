"""The machine's memory: what is given back, and what oneDNN may keep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.runtime import keep_few_products, release_memory

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_freed_memory_goes_back_to_the_system() -> None:
    release_memory()
    pieces = [torch.ones(16_000) for _ in range(4000)]  # 64 kB each, 256 MB: all from the C library's heap
    kept = pieces[::100]  # what stays lies between what goes
    held = resident()
    del pieces
    release_memory()
    assert resident() < held - 200e6
    assert all(piece.sum() == 16_000 for piece in kept)


IN_A_FRESH_HEAP = """
import os, torch
from veneer.runtime import leaving_no_gaps
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def left():
    before = resident()
    pieces = [torch.ones(32_000) for _ in range(1000)]  # 128 kB each, 128 MB
    kept = pieces[::100]  # what stays lies between what goes
    del pieces
    return (resident() - before) / 1e6
with leaving_no_gaps():
    inside = left()
print(inside, left())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_what_is_freed_meanwhile_leaves_no_gaps() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_HEAP], capture_output=True, text=True, check=True)
    inside, outside = map(float, done.stdout.split())
    assert inside < 20
    assert outside > 100, "else the test says nothing"


def test_one_that_is_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CAPACITY, raising=False)
    keep_few_products()
    assert os.environ[CAPACITY] == "256"
    monkeypatch.setenv(CAPACITY, "7")
    keep_few_products()
    assert os.environ[CAPACITY] == "7"
