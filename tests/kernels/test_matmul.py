"""Sums of products in native code: rounded once, in one order, whatever the shapes."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import Tensor

from veneer.kernels import native
from veneer.kernels.lora_linear import lora_linear
from veneer.kernels.matmul import Plain, Turned, as_tensor, factor_grad, sum_of_products
from veneer.quant.config import QuantConfig
from veneer.quant.encode import quantize
from veneer.quant.packing import decode_4bit

BF16 = torch.bfloat16
HAS = native.can_take(torch.zeros(1, dtype=BF16), function="matmul")
BLOCK = native.block_of_products() or 1
needs_native = pytest.mark.skipif(not HAS, reason=f"no products in native code: {native.description()}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def assert_rounded_once(got: Tensor, want: Tensor) -> None:
    """``got`` in bfloat16 is ``want`` in float64 to one rounding of it, but for what float32 loses in the sum.

    In blocks, also but for the digits that small numbers lose beside a large one.
    """
    assert got.dtype == BF16
    best = (want.to(BF16).double() - want).norm()
    assert (got.double() - want).norm() <= (1.001 if BLOCK == 1 else 1.01) * best + 1e-6 * want.norm()


def exact(*parts: Turned | Plain, bias: Tensor | None = None) -> Tensor:
    total = torch.zeros(1, dtype=torch.float64)
    for part in parts:
        weight = part.weight if isinstance(part.weight, Tensor) else part.weight.dequantize()
        rows, weight = part.rows.double(), weight.double()
        total = total + rows @ (weight.t() if isinstance(part, Turned) else weight)
    return total if bias is None else total + bias.double()


# Rows in whole tiles and not, columns of each width of a panel, depths beyond one slice, and several groups of panels.
SHAPES = [
    (32, 2, 1),
    (33, 18, 5),
    (50, 64, 16),
    (100, 66, 17),
    (191, 64, 33),
    (192, 34, 49),
    (200, 130, 64),
    (97, 32, 90),
]


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("rows", "depth", "columns"), [*SHAPES, (40, 4200, 700), (33, 9000, 70)])
def test_a_sum_is_rounded_once(rows: int, depth: int, columns: int, threads: int) -> None:
    x, w, h, b, bias = draw(rows, depth), draw(columns, depth), draw(rows, 8), draw(columns, 8), draw(columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        turned = (Turned(x, w), Turned(h, b))
        plain = (Plain(x, w.t().contiguous()), Plain(h, b.t().contiguous()))
        for parts in (turned, plain):
            assert_rounded_once(sum_of_products(*parts), exact(*parts))
            assert_rounded_once(sum_of_products(*parts, bias=bias), exact(*parts, bias=bias))
        p = draw(rows, 25)
        want = p.double().t() @ x.double()
        assert (factor_grad(p, x).double() - want).norm() <= 1e-6 * want.norm()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [3, 49, 200])
def test_columns_are_scaled_after_they_are_rounded(columns: int) -> None:
    x, w, h, b = draw(77, 640), draw(columns, 640), draw(77, 8), draw(columns, 8)
    less_one, out = draw(columns) * 0.1, torch.empty(77, columns, dtype=BF16)
    parts = Turned(x, w), Turned(h, b)
    u = sum_of_products(*parts)
    assert torch.equal(sum_of_products(*parts, less_one=less_one, out=out), torch.addcmul(u, u, less_one))
    assert torch.equal(out, torch.addcmul(u, u, less_one))


@needs_native
def test_the_same_bits_on_any_number_of_threads() -> None:
    x, w = draw(300, 640), draw(200, 640)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((sum_of_products(Turned(x, w)), factor_grad(x[:, :24], x)))
    finally:
        torch.set_num_threads(before)
    for product, grad in found[1:]:
        assert torch.equal(product, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64])
def test_rows_that_lie_apart_and_an_output_among_others(dtype: torch.dtype) -> None:
    wide, weights = draw(64, 100).to(dtype), draw(90, 100).to(dtype)
    parts = Turned(wide[:, :40], weights[:50, :40]), Turned(wide[:, 60:], weights[:50, 60:])
    out = torch.full((64, 120), 7.0, dtype=dtype)
    given = sum_of_products(*parts, out=out[:, 30:80])
    assert given.data_ptr() == out[:, 30:80].data_ptr()
    tolerance = 1e-2 if dtype == BF16 else 1e-5
    torch.testing.assert_close(out[:, 30:80].double(), exact(*parts), rtol=tolerance, atol=10 * tolerance)
    assert bool((out[:, :30] == 7).all())
    assert bool((out[:, 80:] == 7).all())
    want = wide[:, 5:13].double().t() @ wide[:, 60:].double()
    torch.testing.assert_close(factor_grad(wide[:, 5:13], wide[:, 60:]).double(), want, rtol=tolerance, atol=0.3)


@pytest.mark.parametrize(("rows", "depth"), [(8, 64), (64, 33)])  # too few, and no whole pairs
def test_what_native_code_does_not_take_goes_to_pytorch(rows: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "call_struct", None)
    x, w, bias = draw(rows, depth), draw(24, depth), draw(24)
    torch.testing.assert_close(
        sum_of_products(Turned(x, w), bias=bias).double(), exact(Turned(x, w), bias=bias), rtol=1e-2, atol=0.1
    )


@pytest.mark.parametrize("left_out", [True, pytest.param(False, marks=needs_native)])
@pytest.mark.parametrize("size", [64, 1536])  # the second is decoded tile by tile
def test_a_weight_in_codes_is_its_numbers(size: int, left_out: bool) -> None:
    weight = quantize(torch.randn(size, 1024), QuantConfig()).to(dtype=BF16)
    x, dy, h, b = draw(40, 1024), draw(40, size), draw(40, 8), draw(size, 8)
    forward, back = (Turned(x, weight), Turned(h, b)), (Plain(dy, weight), Plain(h, draw(8, 1024)))

    def compute() -> list[Tensor]:
        return [sum_of_products(*forward), sum_of_products(*back)]

    if left_out:
        with native.left_out():
            found = compute()
    else:
        found = compute()
    for got, parts in zip(found, (forward, back)):
        want = exact(*parts)
        assert (got.double() - want).norm() <= 4e-3 * want.norm()


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("left_out", [True, pytest.param(False, marks=needs_native)])
def test_an_update_smaller_than_the_rounding_of_the_base_is_not_lost(left_out: bool, coded: bool) -> None:
    """A step of training changes an output by less than bfloat16 tells apart: a base rounded by itself swallows it."""
    x, plain, bias = draw(512, 256), draw(256, 256), draw(256)
    w = quantize(plain.float(), QuantConfig()).to(dtype=BF16) if coded else plain
    A, B = torch.randn(8, 256) / 16, 1e-3 * torch.randn(256, 8)
    want = (x.double() @ (B @ A).double().t()).flatten()

    def arrives(bias: Tensor | None) -> float:
        moved = lora_linear(x, w, bias, A, B, 1.0) - lora_linear(x, w, bias, A, 0 * B, 1.0)
        return float(moved.double().flatten() @ want / want.square().sum())

    with native.left_out() if left_out else contextlib.nullcontext():
        assert arrives(None) == pytest.approx(1, abs=0.1)
        assert 0.8 < arrives(bias) < 1.1  # PyTorch's way rounds the update with the bias first
    rounded = x @ as_tensor(w).t()
    swallowed = (rounded + (x @ A.to(BF16).t()) @ B.to(BF16).t() - rounded).double().flatten()
    assert float(swallowed @ want / want.square().sum()) < 0.5  # as adapters over bfloat16 usually are


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(value: float) -> None:
    x, w = draw(40, 32), draw(20, 32)
    x[3, 5] = value
    assert sum_of_products(Turned(x, w)).isfinite().all(1).tolist() == [i != 3 for i in range(40)]
    assert factor_grad(w[:, :4], draw(20, 8)).isfinite().all()
    assert not factor_grad(x[:, 4:8], x).isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4"])
@pytest.mark.skipif(native.library() is None, reason=native.description())
def test_codes_are_decoded_to_the_same_bits(scheme: str, dtype: torch.dtype) -> None:
    for rows, groups, size in itertools.product((1, 7), (1, 3), (2, 6, 16, 22, 64)):
        codes = torch.randint(256, (rows, groups * size // 2 + 3), dtype=torch.uint8)[:, : groups * size // 2]
        scales = torch.rand(rows, groups + 1)[:, 1:]
        scales[0, 0] = float("nan")
        ours, theirs = (torch.empty(rows, groups * size, dtype=dtype) for _ in range(2))
        before = native.calls
        decode_4bit(codes, scales, scheme, ours)
        assert native.calls == before + 1
        with native.left_out():
            decode_4bit(codes, scales, scheme, theirs)
        assert torch.equal(ours.nan_to_num(99.0), theirs.nan_to_num(99.0))


@pytest.mark.skipif(BLOCK == 1, reason="every number keeps its own exponent here")
class TestBlocks:
    @staticmethod
    def product(x: Tensor, w: Tensor) -> Tensor:
        return sum_of_products(Turned(x, w))

    def test_numbers_of_at_least_a_sixteenth_of_the_largest_lose_nothing(self) -> None:
        """Also at the largest sums that a block can have: all digits set, all of one sign."""
        most = torch.full((64, 3 * BLOCK), 255 / 128).to(BF16)
        x, w = ((draw(64, 3 * BLOCK).sign() * (1 + 14 * torch.rand(64, 3 * BLOCK))).to(BF16) for _ in range(2))
        for a, b in ((x, w), (most, most), (most, -most), (x * 2.0**-60, w * 2.0**40)):
            want = a.double() @ b.double().t()
            best = (want.to(BF16).double() - want).norm()
            assert (self.product(a, b).double() - want).norm() <= 1.001 * best + 1e-6 * want.norm()

    @pytest.mark.parametrize("outlier", [10.0, 1000.0, 1e6])
    def test_others_lose_at_most_a_4096th_of_the_largest(self, outlier: float) -> None:
        x, w = draw(64, 4 * BLOCK), draw(48, 4 * BLOCK)
        x[:, 5] *= outlier
        got, want = self.product(x, w).double(), x.double() @ w.double().t()

        def lost(t: Tensor) -> Tensor:
            largest = t.double().abs().unflatten(1, (-1, BLOCK)).amax(-1).repeat_interleave(BLOCK, 1)
            return torch.minimum(largest / 4096, t.double().abs())

        bound = lost(x) @ w.double().abs().t() + x.double().abs() @ lost(w).t() + lost(x) @ lost(w).t()
        rounding = want.abs() * 2.0**-8
        assert ((got - want).abs() <= bound + rounding).all()
        assert (got - want).norm() <= 2e-3 * want.norm() + (want.to(BF16).double() - want).norm()

    def test_zeros_and_the_smallest_numbers(self) -> None:
        x, w = draw(64, BLOCK), draw(48, BLOCK)
        assert (self.product(x * 0, w) == 0).all()
        assert (self.product(x, w * 0) == 0).all()
        small = x * 1e-24
        want = small.double() @ w.double().t()
        assert (self.product(small, w).double() - want).norm() <= 0.01 * want.norm()
        assert (self.product(x * 1e-38, w * 1e-5) == 0).all()

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    def test_what_is_no_number_is_not_hidden(self, value: float) -> None:
        for where in ("rows", "weight"):
            x, w = draw(64, 2 * BLOCK), draw(48, 2 * BLOCK)
            (x if where == "rows" else w)[3, BLOCK + 1] = value
            found = ~self.product(x, w).isfinite()
            assert found[3].all() if where == "rows" else found[:, 3].all()
            assert found.sum() == (48 if where == "rows" else 64)
