"""The same computation by code of our own and by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from veneer.kernels import native


def both(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """What native code and PyTorch give, tensor by tensor; that the first ran is made sure of."""
    calls: list[str] = []
    call = native.call
    with monkeypatch.context() as patch:
        patch.setattr(native, "call", lambda name, *rest: (calls.append(name), call(name, *rest)))
        ours = compute()
    assert calls
    with monkeypatch.context() as patch, native.left_out():
        patch.setattr(native, "call", None)
        yield from zip(ours, compute(), strict=True)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e} above {tolerance:.0e}"
