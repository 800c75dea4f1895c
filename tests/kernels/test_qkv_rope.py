"""The fused projections of attention against their reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.kernels.gated_mlp import LowRankLinear
from veneer.kernels.qkv_rope import qkv_rope, qkv_rope_reference
from veneer.kernels.rms_norm import Norm

DOUBLE = torch.float64
HEADS, KEYS, SIZE, WIDTH, ROWS = 4, 2, 6, 10, 7


def angles(dtype: torch.dtype, length: float = 1.0) -> tuple[Tensor, Tensor]:
    theta = torch.rand(ROWS, SIZE // 2, dtype=DOUBLE) * 6
    theta = torch.cat((theta, theta), -1)
    return (length * theta.cos()).to(dtype), (length * theta.sin()).to(dtype)


def operands(scaled: bool) -> list[Tensor]:
    """A and B of q, k and v, then their row scales."""
    outs = [HEADS * SIZE, KEYS * SIZE, KEYS * SIZE]
    found = []
    for out, rank in zip(outs, (3, 2, 1)):
        found += [torch.randn(rank, WIDTH, dtype=DOUBLE), 0.3 * torch.randn(out, rank, dtype=DOUBLE)]
    if scaled:
        found += [1 + 0.2 * torch.randn(out, dtype=DOUBLE) for out in outs]
    return [t.requires_grad_() for t in found]


def runner(function, biased: bool, dtype: torch.dtype = DOUBLE, length: float = 1.0, normed: str = ""):
    torch.manual_seed(1)
    cos, sin = angles(dtype, length)
    sizes = [HEADS * SIZE, KEYS * SIZE, KEYS * SIZE]
    weights = [torch.randn(n, WIDTH, dtype=DOUBLE).to(dtype) for n in sizes]
    biases = [torch.randn(n, dtype=DOUBLE).to(dtype) if biased else None for n in sizes]

    widths = {"": [], "head": [SIZE, SIZE], "all": sizes[:2]}[normed]
    norms = [1 + 0.3 * torch.randn(n, dtype=DOUBLE).to(dtype) for n in widths]

    def run(x: Tensor, *t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def wide(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(x.dtype)

        g = t[6:] or (None, None, None)
        parts = [
            LowRankLinear(wide(weights[i]), wide(biases[i]), t[2 * i], t[2 * i + 1], 0.5 + i, g[i]) for i in range(3)
        ]
        own = tuple(Norm(weight.to(x.dtype), 1e-5, float(i)) for i, weight in enumerate(norms)) or None
        return function(x, *parts, wide(cos), wide(sin), own)

    return run


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("length", "normed"), [(1.0, ""), (1.3, ""), (1.0, "head"), (1.3, "all")])
def test_gradients_in_double_precision(biased: bool, scaled: bool, length: float, normed: str) -> None:
    torch.manual_seed(0)
    x, trained = torch.randn(ROWS, WIDTH, dtype=DOUBLE, requires_grad=True), operands(scaled)
    assert torch.autograd.gradcheck(runner(qkv_rope, biased, length=length, normed=normed), (x, *trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("normed", ["", "head", "all"])
def test_equals_the_reference(dtype: torch.dtype, biased: bool, scaled: bool, normed: str) -> None:
    torch.manual_seed(0)
    x, trained = torch.randn(ROWS, WIDTH, dtype=DOUBLE).to(dtype).requires_grad_(), operands(scaled)
    wide = [t.detach().to(DOUBLE).requires_grad_() for t in (x, *trained)]
    got = runner(qkv_rope, biased, dtype, normed=normed)(x, *trained)
    want = runner(qkv_rope_reference, biased, dtype, normed=normed)(*wide)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    upstream = [torch.randn(w.shape, dtype=DOUBLE) for w in want]
    torch.autograd.backward(got, [u.to(dtype) for u in upstream])
    torch.autograd.backward(want, upstream)
    assert all(g.is_contiguous() and g.dtype == dtype for g in got)
    pairs = [*zip(got, want), *((a.grad, b.grad) for a, b in zip((x, *trained), wide))]
    for a, b in pairs:
        assert (a.to(DOUBLE) - b).norm() < tolerance * b.norm()


def test_with_a_row_scale_nothing_is_kept_that_attention_does_not_keep(monkeypatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, dtype=DOUBLE, requires_grad=True)
    saved: dict[int, tuple[int, ...]] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = runner(qkv_rope, biased=False)(x, *operands(scaled=True))
    for out in outs:  # attention keeps them
        saved.pop(out.untyped_storage().data_ptr())
    assert sorted(s for s in saved.values() if s[0] == ROWS) == [(ROWS, 6), (ROWS, SIZE), (ROWS, SIZE), (ROWS, WIDTH)]


def test_frozen_factors_A_keep_no_input_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    x, trained = torch.randn(ROWS, WIDTH, dtype=DOUBLE, requires_grad=True), operands(False)
    for A in trained[::2]:
        A.requires_grad_(False)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        outs = runner(qkv_rope, biased=True)(x, *trained)
    assert (ROWS, WIDTH) not in saved
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    assert all(A.grad is None for A in trained[::2])
    assert all(B.grad is not None for B in trained[1::2])
    assert x.grad is not None
