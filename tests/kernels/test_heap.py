"""Memory for tensors that fits again when it was freed; each test in a process of its own, as there is no way back."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.kernels import native

pytestmark = [
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc"),
    pytest.mark.skipif(native.library() is None, reason=native.description()),
]

HEAD = """
import sys, torch
from veneer.kernels.heap import reuse_freed_memory
early = [torch.full((size,), 3.0) for size in (1, 100, 40_000, 20_000_000)]
taken = reuse_freed_memory() if "take" in sys.argv else None
"""

HOLES = """
import os
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
pieces = [torch.ones(24_000) for _ in range(4000)]  # 96 kB each, from the heap
kept = pieces[::2]
before = resident()
del pieces  # every other one
again = [torch.ones(24_000) for _ in range(2000)]
print(taken, (resident() - before) / 1e6)
"""

WORK = """
assert taken
sizes = [0, 1, 2, 63, 64, 1000, 250_000, 20_000_000]
tensors = [torch.full((size,), 2.0) for size in sizes]
assert all(t.data_ptr() % 64 == 0 for t in tensors)
assert [t.sum().item() for t in tensors] == [2.0 * size for size in sizes]
tensors[5].resize_(5000)
assert tensors[5][:1000].sum() == 2000
for dtype in (torch.float32, torch.bfloat16):  # oneDNN asks the allocator for memory by itself
    x = torch.ones(64, 128, dtype=dtype)
    layer = torch.nn.Linear(128, 32, dtype=dtype)
    layer(x).sum().backward()
assert torch.from_numpy(torch.ones(7).numpy()).clone().sum() == 7
assert [t.sum().item() for t in early] == [3.0, 300.0, 120_000.0, 60_000_000.0]
del early, tensors, layer, x  # what an allocator of before gave as well
from torch.profiler import ProfilerActivity, profile
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
    torch.ones(1000)
assert any(event.self_cpu_memory_usage >= 4000 for event in run.key_averages())
try:
    torch.empty(2**60, dtype=torch.uint8)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


def output(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", HEAD + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_a_freed_piece_serves_the_next_request_of_its_size() -> None:
    (said, grown), (_, otherwise) = (output(HOLES, *arguments).split() for arguments in (("take",), ()))
    assert said == "True"
    assert float(grown) < 10
    assert float(otherwise) > 80, "else the test says nothing"


def test_everything_works_as_before() -> None:
    assert "can't allocate memory" in output(WORK, "take")  # the words by which the command line knows it


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"VENEER_KERNELS": "torch"}, "VENEER_KERNELS=torch"), ({"PATH": "", "CXX": ""}, "no C++ compiler")],
)
def test_where_it_is_not_wanted_or_cannot_be_compiled_all_stays(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    code = "from veneer.kernels.heap import description; print(taken, description())"
    said = output(code, "take", VENEER_CACHE=str(tmp_path), **environment)
    assert said == f"False PyTorch's: {reason}"


def test_it_is_compiled_against_the_torch_that_is_there(tmp_path: Path) -> None:
    assert output("print(taken)", "take", VENEER_CACHE=str(tmp_path)) == "True"
    assert len(list((tmp_path / "kernels").iterdir())) == 1
