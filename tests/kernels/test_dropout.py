"""Dropout by counter: the same mask in native code, in PyTorch and in every dtype; and it is a good one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.kernels import native
from veneer.kernels.dropout import Dropout
from veneer.kernels.gated_mlp import LowRankLinear, gated_mlp, gated_mlp_reference
from veneer.kernels.lora_linear import lora_linear, lora_linear_reference
from veneer.kernels.matmul import Plain, Turned, factor_grad, sum_of_products
from veneer.kernels.qkv_rope import qkv_rope, qkv_rope_reference

BF16, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
needs_native = pytest.mark.skipif(native.library() is None, reason=native.description())


def hashed(index: int, seed: int) -> int:
    """The hash in plain whole numbers."""

    key = (seed + 0x9E3779B97F4A7C15) % 2**64
    key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    key = ((key ^ key >> 27) * 0x94D049BB133111EB) % 2**64
    key = (key ^ key >> 31) >> 1
    h = (index // 2 ^ key) % 2**32
    h = (h ^ h >> 16) * 0x7FEB352D % 2**32
    h ^= ((index >> 33) * 0x9E3779B9 + (key >> 32)) % 2**32
    h = (h ^ h >> 15) * 0x846CA68B % 2**32
    h ^= h >> 16
    return h >> 16 if index % 2 else h % 2**16


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**62 - 1])
def test_the_mask_is_the_hash(seed: int) -> None:
    drop = Dropout(0.3, seed)
    assert drop.mask(1100).tolist() == [hashed(i, seed) >= round(0.3 * 2**16) for i in range(1100)]
    far = 2**33 * 5 - 51  # where the counter's lower half begins anew
    assert drop.mask(100, first=far).tolist() == [hashed(far + i, seed) >= round(0.3 * 2**16) for i in range(100)]


def test_what_stays_is_scaled_by_the_very_share_that_stays() -> None:
    p = 1e-4  # a step of 2^-16 is a seventh of it
    kept = Dropout(p, 3).of(torch.ones(4)).max()
    assert kept == torch.tensor(1 / (1 - round(p * 2**16) / 2**16))
    assert Dropout(0.9999999, 3).of(torch.ones(4)).isfinite().all()


def test_rows_in_parts_have_the_mask_that_they_have_together() -> None:
    x, drop = torch.ones(150, 257), Dropout(0.3, 7)
    parts = [drop.of(x[:1]), drop.after(1).of(x[1:90]), drop.after(1).after(89).of(x[90:])]
    assert torch.equal(torch.cat(parts), drop.of(x))


@needs_native
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (130, 257), (40, 576)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [0, 5, 2**32 // 257])
def test_native_code_gives_the_same_bits(dtype: torch.dtype, shape: tuple[int, ...], threads: int, rows: int) -> None:
    x, total = torch.randn(2, *shape).to(dtype).unbind()
    drop, before = Dropout(0.1, 77 * 2**33 + 5).after(rows), torch.get_num_threads()
    torch.set_num_threads(threads)
    ours = drop.of(x), drop.add(total.clone(), x)
    torch.set_num_threads(before)
    with native.left_out():
        plain = drop.of(x), drop.add(total.clone(), x)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))
    kept = drop.mask(x.numel(), first=rows * shape[-1]).view(shape)
    assert torch.equal(ours[0] != 0, kept)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(32, 64, 8), (77, 96, 40), (300, 46, 24), (50, 2150, 72), (40, 33, 8)]
)
@pytest.mark.parametrize("before", [0, 5, 2**33 // 46 - 10])
def test_a_mask_within_a_product_gives_the_bits_of_one_beside_it(
    dtype: torch.dtype, threads: int, rows: int, width: int, rank: int, before: int
) -> None:
    drop, torch_threads = Dropout(0.2, 2**50 + 3).after(before), torch.get_num_threads()
    x = torch.randn(rows, width + 4).to(dtype)[:, :width]  # its rows lie apart
    dy, weight, bias = (torch.randn(s).to(dtype) for s in ((rows, 34), (34, width), (width,)))
    p, sa = torch.randn(rows, rank).to(dtype), torch.randn(rank, width).to(dtype)
    torch.set_num_threads(threads)
    try:
        masked = drop.of(x.contiguous())
        assert torch.equal(sum_of_products(Turned(x, sa, drop)), sum_of_products(Turned(masked, sa)))
        assert torch.equal(factor_grad(p, x, drop), factor_grad(p, masked))
        out = torch.empty(rows, width + 2, dtype=dtype)[:, :width]
        ours = sum_of_products(Plain(dy, weight), Plain(p, sa, drop), bias=bias, out=out)
        beside = drop.add(sum_of_products(Plain(dy, weight), bias=bias), sum_of_products(Plain(p, sa)))
        assert ours is out
        assert torch.equal(ours, beside)
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_is_fair_and_its_neighbours_and_seeds_are_independent(p: float) -> None:
    n = 200_000
    masks = torch.stack([Dropout(p, seed).mask(n) for seed in (0, 1, 2, 2**40)]).double()
    spread = (p * (1 - p) / n) ** 0.5
    assert (masks.mean(1) - (1 - p)).abs().max() < 5 * spread
    centred = (masks - (1 - p)) / (p * (1 - p)) ** 0.5
    limit = 5 / n**0.5
    for shift in (1, 2, 3, 4, 16, 31, 32, 64, 512, 576, 577, 1536, 3072):
        assert (centred[:, shift:] * centred[:, :-shift]).mean(1).abs().max() < limit
    correlation = centred @ centred.t() / n
    assert (correlation - torch.eye(4)).abs().fill_diagonal_(0).max() < limit


def test_each_draw_is_another_one_and_follows_torchs_seed() -> None:
    torch.manual_seed(3)
    first, second = Dropout.drawn(0.2), Dropout.drawn(0.2)
    torch.manual_seed(3)
    assert Dropout.drawn(0.2) == first != second
    assert Dropout.drawn(0.0) is None


def test_its_gradient_has_the_same_mask() -> None:
    drop, x = Dropout(0.4, 9), torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(drop, (x,))
    ratio, slope = drop(x) / x.detach(), torch.autograd.grad(drop(x).sum(), x)[0]
    assert torch.equal(ratio != 0, slope != 0)
    torch.testing.assert_close(ratio, slope, rtol=1e-14, atol=0)


def operands(outs: int, ins: int, drop: Dropout | None) -> LowRankLinear:
    A, B, g = (torch.randn(s, dtype=DOUBLE, requires_grad=True) for s in ((3, ins), (outs, 3), (outs,)))
    return LowRankLinear(torch.randn(outs, ins, dtype=DOUBLE), torch.randn(outs, dtype=DOUBLE), A, B, 0.7, g, drop)


def assert_same(ours: list[Tensor], plain: list[Tensor], leaves: list[Tensor]) -> None:
    upstream = [torch.randn_like(t) for t in plain]
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(plain, leaves, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_every_operation_gives_its_references_gradients_under_dropout() -> None:
    x = torch.randn(7, 6, dtype=DOUBLE, requires_grad=True)
    drop, other = Dropout(0.4, 11), Dropout(0.4, 12)
    p = operands(8, 6, drop)
    arguments = (x, p.weight, p.bias, p.A, p.B, p.scaling, p.row_scale, drop)
    assert_same([lora_linear(*arguments)], [lora_linear_reference(*arguments)], [x, p.A, p.B, p.row_scale])
    assert not torch.allclose(lora_linear(*arguments), lora_linear(*arguments[:-1]))

    parts = [operands(8, 6, drop), operands(8, 6, drop), operands(6, 8, other)]
    leaves = [x, *(t for part in parts for t in (part.A, part.B, part.row_scale))]
    assert_same([gated_mlp(x, *parts)], [gated_mlp_reference(x, *parts)], leaves)

    parts = [operands(8, 6, drop), operands(4, 6, drop), operands(4, 6, drop)]
    leaves = [x, *(t for part in parts for t in (part.A, part.B, part.row_scale))]
    angle = torch.randn(7, 2, dtype=DOUBLE).repeat(1, 2)
    turns = angle.cos(), angle.sin()
    assert_same(list(qkv_rope(x, *parts, *turns)), list(qkv_rope_reference(x, *parts, *turns)), leaves)


def test_linears_that_read_the_same_rows_need_one_draw() -> None:
    x = torch.randn(7, 6, dtype=DOUBLE)
    first, second = operands(8, 6, Dropout(0.4, 1)), operands(8, 6, Dropout(0.4, 2))
    with pytest.raises(ValueError, match="one draw"):
        gated_mlp(x, first, second, operands(6, 8, None))
    with pytest.raises(ValueError, match="one draw"):
        qkv_rope(x, first, first, second, torch.ones(7, 4, dtype=DOUBLE), torch.zeros(7, 4, dtype=DOUBLE))
