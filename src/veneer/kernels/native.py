"""Code of our own beside PyTorch's: C++ on the CPU (``cpp``), Triton on a GPU (``rows_triton``).

The C++ is compiled once for this processor where there is a compiler, else it is not there; the library lies in the
cache folder under a name made of its source, the compiler and the processor. Functions take contiguous tensors in
float32 or bfloat16, and trust their callers with shapes. ``VENEER_KERNELS=torch`` in the environment leaves all of it
out, ``VENEER_KERNELS=torch:softmax,turn`` some of it (:data:`FUNCTIONS`): every operation has its PyTorch code as well,
and gives the same numbers to rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from veneer.errors import UsageError
from veneer.files import cache_dir

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-fopenmp")
# The object refers to OpenMP without naming a library for it: it takes the one that torch has loaded, and its threads.
LINK = ("-shared", "-Wl,-z,undefs")
# What can be left out by name, each with its variants: "gate" is gate_silu and gate_gelu_tanh.
_NAMES = "attention cross_entropy decode4 decoder_step drop few_rows gate matmul outer rms_norm scale_back softmax turn"
FUNCTIONS = tuple(_NAMES.split())
calls = 0  # how many functions were called so far
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Missing(Exception):
    """Why there is no library."""


def can_take(*tensors: Tensor, function: str) -> bool:
    """Whether there is a function for tensors like these: plain, on one device, of one dtype, contiguous.

    Raises:
        UsageError: ``VENEER_KERNELS`` is none of its values.
    """
    if _is_left_out(function):
        return False
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in _SUFFIXES or not all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == dtype and t.device == device and t.is_contiguous()
        for t in tensors
    ):
        return False
    if device.type == "cuda":
        on_gpu = gpu_functions()
        return on_gpu is not None and hasattr(on_gpu, function)
    found = library() if device.type == "cpu" else None
    return found is not None and hasattr(found, f"{function}_{_SUFFIXES[dtype]}")


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a function of the dtype of its first tensor; whole numbers go as int64, others as float32, None as null."""
    global calls
    calls += 1
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.device.type == "cuda":
        getattr(gpu_functions(), name)(*arguments)
        return
    function = getattr(library(), f"{name}_{_SUFFIXES[first.dtype]}")
    function(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))


def call_struct(name: str, dtype: torch.dtype, argument: ctypes.Structure) -> None:
    """Calls a function that takes all it needs in one structure."""
    global calls
    calls += 1
    getattr(library(), f"{name}_{_SUFFIXES[dtype]}")(ctypes.byref(argument), ctypes.c_int(torch.get_num_threads()))


def _as_c(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def block_of_products() -> int | None:
    """Numbers under one exponent in products in bfloat16, 1 where each keeps its own; None where PyTorch multiplies.

    In block floating point (Wilkinson 1963) each has 12 bits and a sign beside that exponent.
    """
    found = library()
    if found is None or _is_left_out("matmul") or not hasattr(found, "block_of_matmul"):
        return None
    return int(found.block_of_matmul())


def description() -> str:
    """What the operations run on, in words."""
    found, names = _found(), _left_out(_setting())
    but = f", but for {', '.join(names)} (VENEER_KERNELS)" if names else ""
    return f"PyTorch alone: {found}" if isinstance(found, Missing) else f"native code beside PyTorch{but}"


def _setting() -> str:
    return os.environ.get("VENEER_KERNELS", "")


@functools.cache
def _left_out(setting: str) -> tuple[str, ...]:
    """The functions that ``VENEER_KERNELS`` names; none where it leaves out all of them, or nothing.

    Raises:
        UsageError: it is something else.
    """
    kind, colon, listed = setting.partition(":")
    names = tuple(name.strip() for name in listed.split(",")) if colon else ()
    wrong = next((name for name in names if name not in FUNCTIONS), None)
    if kind not in ("", "torch") or (colon and not kind) or wrong is not None:
        raise UsageError(
            f"no function is called '{wrong}'" if wrong is not None else f"'{setting}' is no setting",
            where="the environment, VENEER_KERNELS",
            fix=f"set it to torch, or to torch: and some of {', '.join(FUNCTIONS)}",
        )
    return names


def _is_left_out(function: str) -> bool:
    return any(function == name or function.startswith(f"{name}_") for name in _left_out(_setting()))


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Inside, operations take their PyTorch code, as they do on any other device."""
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


_wanted = True


def gpu_functions() -> ModuleType | None:
    """Those for a GPU; None where they are not wanted or there is no Triton."""
    return _triton() if _wanted and _setting() != "torch" else None


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from veneer.kernels import rows_triton
    except ImportError:
        return None
    return rows_triton


def library() -> ctypes.CDLL | None:
    """The library; None where there is none."""
    found = _found() if _wanted else None
    return None if isinstance(found, Missing) else found


@functools.cache
def _found() -> ctypes.CDLL | Missing:
    try:
        flags = FLAGS if _may_use_tiles() else (*FLAGS, "-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
        return ctypes.CDLL(str(built(sorted(SOURCES.iterdir()), flags, LINK)))
    except Missing as reason:
        return reason
    except OSError as error:  # it cannot be loaded, or the cache folder cannot be written
        return Missing(str(error))


def _may_use_tiles() -> bool:
    """Whether this process may use the unit for tiles (AMX); True where there is none."""
    return " amx_tile" not in _processor() or _ask_linux_for_tiles()


def _ask_linux_for_tiles() -> bool:
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # Linux, Documentation/arch/x86/xstate.rst
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def built(sources: Sequence[Path], flags: tuple[str, ...], link: tuple[str, ...]) -> Path:
    """Where the library of these files lies, compiled if need be.

    Raises:
        Missing: it is not wanted, or cannot be compiled.
        OSError: the cache folder cannot be written.
    """
    if _setting() == "torch":
        raise Missing("VENEER_KERNELS=torch")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise Missing("no C++ compiler")
    settings = (*flags, *link, _output(compiler, "--version"), _processor())
    parts = (*(path.read_bytes() for path in sources), *map(str.encode, settings))
    place = cache_dir() / "kernels" / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made, objects = Path(folder) / place.name, []
            for path in sources:
                if path.suffix == ".cpp":
                    objects.append(str(Path(folder) / f"{path.stem}.o"))
                    _output(compiler, *flags, "-c", str(path), "-o", objects[-1])
            _output(compiler, *objects, *link, "-o", str(made))
            made.replace(place)  # whole, and the same whoever else makes it
    return place


def _processor() -> str:
    """The kind of processor and what it can do: code for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _output(*command: str) -> str:
    """What a command prints.

    Raises:
        Missing: it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        told = next((line for line in lines if "error:" in line), lines[0])  # compilers first say where they are
        raise Missing(f"{Path(command[0]).name} failed: {told}")
    return done.stdout
