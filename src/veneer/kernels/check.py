"""Do the operations give what plain PyTorch gives in float32, on the operands that a run has?

    with watching() as watch:
        model(batch)
    watch.findings

While watched, an operation that is called computes twice more, on copies of its operands: by itself, and by its
reference with everything in float32, both forward and backward. A factor that is still zero is given values in the
copies, or the gradient of its partner would be zero whatever the code does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from veneer.kernels import native

P = ParamSpec("P")
R = TypeVar("R")
Path = tuple[str, ...]

# |ours - float32| / |float32|. Rounding alone gives up to 1 % in bfloat16; where it gives more, so may the operation.
TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.01}
FLOAT_TOLERANCE = 1e-3
TIMES_ROUNDING = 4.0
LARGEST = 2**30  # bytes of operands in float32 that a check may make


@dataclass(frozen=True)
class Finding:
    """One tensor that an operation gave, against float32.

    Attributes:
        operation: its name.
        part: ``output`` or ``gradient of gate.A``.
        error: ``|ours - float32| / |float32|``.
        tolerance: how large it may be.
        native: whether native code took part.
    """

    operation: str
    part: str
    error: float
    tolerance: float
    native: bool

    @property
    def is_off(self) -> bool:
        return not self.error <= self.tolerance


@dataclass
class Watch:
    """What is seen of the operations.

    Attributes:
        every: compare every call, however large; else the first one of each operation and shape.
        calls: how often each operation was called.
        findings: what was compared.
        too_large: operations that were not compared, because their operands take more than a gigabyte in float32.
    """

    every: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    too_large: set[str] = field(default_factory=set)
    _seen: set[Any] = field(default_factory=set)

    @torch.enable_grad()
    def look(self, name: str, own: Any, reference: Any, names: Sequence[str], arguments: dict[str, Any]) -> None:
        """Compares a call that is about to be made."""
        self.calls[name] += 1
        tensors = dict(_tensors(arguments))
        activation, activations = names[0], set(names)
        key = (name, *((path, t.dtype, t.shape[-1 if path[0] == activation else -2 :]) for path, t in tensors.items()))
        if key in self._seen and not self.every:
            return
        self._seen.add(key)
        if not self.every and sum(4 * t.shape.numel() for t in tensors.values()) > LARGEST:
            self.too_large.add(name)
            return
        generator = torch.Generator().manual_seed(len(self._seen))
        operands = _map(arguments, functools.partial(_with_values, generator=generator))
        whole = {path: t for path, t in tensors.items() if t.shape.numel()}  # an update may have no rank
        wanted = {path for path, t in whole.items() if activations & {path[0], path[-1]} or t.requires_grad}

        before = native.calls
        ours = _computed(own, operands, wanted, _as_it_is)
        used_native = native.calls > before
        exact = _computed(reference, operands, wanted, _in_float)
        rounded = None
        dtype = tensors[activation,].dtype
        for part, want in exact.items():
            tolerance = TOLERANCES.get(dtype, FLOAT_TOLERANCE)
            error = _difference(ours[part], want) if part in ours else math.inf  # a gradient that it lacks
            if not error <= tolerance:
                rounded = rounded or _computed(reference, operands, wanted, _as_it_is)
                tolerance = max(tolerance, TIMES_ROUNDING * _difference(rounded[part], want))
            self.findings.append(Finding(name, part, error, tolerance, used_native))


_watch: Watch | None = None


@contextlib.contextmanager
def watching(every: bool = False) -> Iterator[Watch]:
    """Compares the operations that are called inside; see :class:`Watch`."""
    global _watch
    before, _watch = _watch, Watch(every)
    try:
        yield _watch
    finally:
        _watch = before


def checked(name: str, reference: Callable[P, R], *activations: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets an operation be watched.

    Args:
        name: what a finding calls it.
        reference: takes the same arguments and is written in plain operations.
        activations: the arguments, and fields of arguments, whose gradient is compared, beside those of trained
            tensors; the first is what the operation is applied to.
    """

    def decorate(own: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(own)

        @functools.wraps(own)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _watch is not None:
                _watch.look(name, own, reference, activations, dict(signature.bind(*args, **kwargs).arguments))
            return own(*args, **kwargs)

        return call

    return decorate


def _map(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same structure with every tensor, and every weight in codes, changed."""
    if isinstance(value, Tensor) or hasattr(value, "dequantize"):
        return change(path, value)
    if isinstance(value, dict):
        return {key: _map(entry, change, (*path, key)) for key, entry in value.items()}
    if type(value) is tuple:
        return tuple(_map(entry, change, (*path, str(place))) for place, entry in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _map(getattr(value, f.name), change, (*path, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every tensor of the arguments that is not of whole numbers, and every weight in codes, by where it stands."""
    found: list[tuple[Path, Any]] = []
    _map(arguments, lambda path, t: found.append((path, t)))
    return ((path, t) for path, t in found if not isinstance(t, Tensor) or t.is_floating_point())


def _with_values(path: Path, t: Any, generator: torch.Generator) -> Any:
    """A trained tensor that is zero with small values instead; anything else as it is."""
    if not isinstance(t, Tensor) or not t.requires_grad or bool(t.any()):
        return t
    return 0.02 * torch.randn(t.shape, generator=generator).to(t.device, t.dtype)


def _as_it_is(t: Any) -> Any:
    return t


def _in_float(t: Any) -> Any:
    plain = t if isinstance(t, Tensor) else t.dequantize()
    return plain.float() if plain.is_floating_point() and plain.dtype != torch.float64 else plain


def _computed(
    function: Callable[..., Any], operands: dict[str, Any], wanted: set[Path], cast: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """The outputs and the wanted gradients, for an output's gradient that is always the same."""
    leaves: dict[Path, Tensor] = {}

    def prepared(path: Path, t: Any) -> Any:
        t = cast(t)
        if path in wanted or (isinstance(t, Tensor) and not isinstance(t, nn.Parameter)):
            t = t.detach().clone()
        if path in wanted:
            leaves[path] = t.requires_grad_()
        return t

    result = function(**_map(operands, prepared))
    outputs = [t for t in _results(result) if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    slopes = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), slopes, allow_unused=True)
    parts = {f"output {i}" if len(outputs) > 1 else "output": t.detach() for i, t in enumerate(outputs)}
    named = {f"gradient of {'.'.join(path)}": grad for path, grad in zip(leaves, grads)}
    return parts | {name: grad for name, grad in named.items() if grad is not None}


def _results(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, f.name) for f in dataclasses.fields(result)]
    return [t for t in result if isinstance(t, Tensor)]


def _difference(ours: Tensor, want: Tensor) -> float:
    """``|ours - want| / |want|``; infinite where only one of them is finite, and 0 where neither is."""
    size = float(want.double().norm())
    if not math.isfinite(size):
        return 0.0 if not bool(ours.isfinite().all()) else math.inf
    error = float((ours.double() - want.double()).norm())
    floor = 1e-6 * math.sqrt(want.numel())  # a gradient that is nothing but rounding
    return math.inf if math.isnan(error) else error / max(size, floor)
