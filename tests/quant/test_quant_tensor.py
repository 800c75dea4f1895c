"""Decoding and the two products: rounded once, any rows, any tile, stacks of experts, and no decoded copy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import UsageError
from veneer.quant import QuantConfig, QuantizedTensor, quantize
from veneer.quant.blockwise import dequantize_blockwise
from veneer.quant.codebooks import codebook
from veneer.quant.config import BLOCK_SIZES

FOUR_BIT = ["nf4", "fp4", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of whole blocks; blocks that cross rows; rows of odd length, which begin in the middle of a byte.
SHAPES = [(96, 64), (33, 130), (17, 576), (7, 9), (5, 1)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def decoded_plainly(stored: QuantizedTensor) -> Tensor:
    """What the codes stand for by the formula, value by value, in float32: codebook[code] * scale."""
    count, size = stored.numel(), stored.config.block_size
    flat = stored.codes.view(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count].long()
    scales = stored.absmax
    if stored.nested_absmax is not None and stored.offset is not None:
        scales = dequantize_blockwise(scales, stored.nested_absmax) + stored.offset
    values = codebook(stored.config.scheme, flat.device)[codes] * scales.repeat_interleave(size)[:count]
    return values.view(stored.shape)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("scheme", FOUR_BIT)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_decoded_weight_is_the_float32_product_rounded_once(
    scheme: str, double_quant: bool, dtype: torch.dtype
) -> None:
    for shape, size in itertools.product(SHAPES, BLOCK_SIZES):
        stored = quantize(torch.randn(shape).to(dtype), QuantConfig(scheme, size, double_quant))
        assert stored.dequantize().dtype == dtype
        assert torch.equal(stored.dequantize(), decoded_plainly(stored).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_decoded_weight_is_the_one_of_bitsandbytes_bit_for_bit(scheme: str, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional", reason="the oracle is not installed")
    # Rows of whole blocks: bitsandbytes 0.50 takes wrong scales on a CPU with AVX512 where blocks cross rows. And sizes
    # under 2048: it compiles a kernel for the others. The formula above covers both.
    shapes = [((40, 128), (32, 64, 128)), ((4, 1024), (256, 512, 1024))]
    for shape, sizes in shapes:
        for size, double_quant in itertools.product(sizes, (True, False)):
            weight = torch.randn(shape).to(dtype)
            codes, state = oracle.quantize_4bit(
                weight, blocksize=size, quant_type=scheme, compress_statistics=double_quant
            )
            ours = quantize(weight, QuantConfig(scheme, size, double_quant)).dequantize()
            assert torch.equal(ours, oracle.dequantize_4bit(codes, state))


def test_a_decoded_int8_weight_is_the_one_of_bitsandbytes_bit_for_bit() -> None:
    pytest.importorskip("bitsandbytes", reason="the oracle is not installed")
    stored = quantize(torch.randn(50, 77), QuantConfig("int8"))
    oracle = torch.ops.bitsandbytes.int8_vectorwise_dequant(stored.codes, stored.absmax)
    assert torch.equal(stored.dequantize(), oracle)
    assert torch.equal(stored.to(dtype=torch.bfloat16).dequantize(), oracle.bfloat16())


@pytest.mark.parametrize("scheme", [*FOUR_BIT, "int8"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 12), (3, 5, 7)])
def test_any_rows_are_decoded_alone(scheme: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.quant.packing.PIECE", 200)  # several pieces
    stored = quantize(torch.randn(shape), QuantConfig(scheme, 32))
    whole = stored.dequantize().view(-1, shape[-1])
    for rows in (slice(0, 1), slice(2, 5), slice(3, None), slice(4, 4), slice(-1, None)):
        assert torch.equal(stored.dequantize(rows), whole[rows])
    out = torch.empty(2, shape[-1], dtype=torch.bfloat16)
    assert stored.dequantize(slice(1, 3), out=out) is out
    assert torch.equal(out, whole[1:3].bfloat16())


def test_rows_with_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="steps of 2"):
        quantize(torch.randn(8, 8)).dequantize(slice(0, 8, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", [*FOUR_BIT, "int8"])
def test_both_products_are_those_of_the_decoded_weight_whatever_the_tile(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sums in another order differ by some roundings; in bfloat16 a sum in float32 is rounded once, at the end.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 4e-3}[dtype]
    for shape, size in itertools.product(SHAPES, (32, 64, 4096)):
        stored = quantize(torch.randn(shape).to(dtype), QuantConfig(scheme, size))
        weight = stored.dequantize()
        x, dy = torch.randn(11, shape[1]).to(dtype), torch.randn(11, shape[0]).to(dtype)
        bias = torch.randn(shape[0]).to(dtype)
        for tile in (1 << 21, 4096, 256):
            monkeypatch.setattr("veneer.quant.tensor.TILE_BYTES", tile)
            for got, want in (
                (stored.linear(x), F.linear(x, weight)),
                (stored.linear(x, bias), F.linear(x, weight, bias)),
                (stored.grad_input(dy), dy @ weight),
            ):
                assert got.dtype == dtype
                assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_products_by_tiles_are_rounded_once(scheme: str) -> None:
    weight = quantize(torch.randn(3000, 576).bfloat16(), QuantConfig(scheme))  # two tiles
    x, dy = torch.randn(64, 576).bfloat16(), torch.randn(64, 3000).bfloat16()
    whole = weight.dequantize().double()
    for got, exact in ((weight.linear(x), x.double() @ whole.T), (weight.grad_input(dy), dy.double() @ whole)):
        # Half a unit of the last of eight bits, and what sums of thousands of products are off in float32.
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("shape", [(300, 576), (300, 130)])
def test_no_more_than_a_tile_is_ever_decoded(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import veneer.quant.tensor as module

    sizes: list[int] = []
    decode = module.decode_4bit

    def spy(codes: Tensor, scales: Tensor, scheme: str, out: Tensor) -> Tensor:
        sizes.append(out.nbytes)
        return decode(codes, scales, scheme, out)

    monkeypatch.setattr(module, "decode_4bit", spy)
    monkeypatch.setattr(module, "TILE_BYTES", 40_000)
    stored = quantize(torch.randn(shape).bfloat16())
    stored.linear(torch.randn(3, shape[1]).bfloat16())
    assert sum(sizes) == 2 * stored.numel()
    assert max(sizes) <= 40_000
    sizes.clear()
    stored.grad_input(torch.randn(3, shape[0]).bfloat16())
    assert sum(sizes) == 2 * stored.numel()
    assert max(sizes) <= 40_000


# Experts of whole blocks; experts that begin inside a block; that begin in the middle of a byte; inside a nested block.
STACKS = [(4, 8, 64), (3, 8, 10), (3, 7, 9), (5, 100, 70)]


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("scheme", [*FOUR_BIT, "int8"])
def test_an_expert_out_of_a_stack_shares_its_codes(scheme: str, shape: tuple[int, int, int]) -> None:
    stack = quantize(torch.randn(shape), QuantConfig(scheme))
    whole = stack.dequantize()
    assert whole.shape == shape
    dy, x = torch.randn(3, shape[1]), torch.randn(3, shape[2])
    for e in range(shape[0]):
        expert = stack.index(e)
        assert expert.shape == shape[1:]
        assert expert.codes.untyped_storage().data_ptr() == stack.codes.untyped_storage().data_ptr()
        assert torch.equal(expert.dequantize(), whole[e])
        assert torch.allclose(expert.linear(x), x @ whole[e].t(), atol=1e-5)
        assert torch.allclose(expert.grad_input(dy), dy @ whole[e], atol=1e-5)
        assert expert.bits_per_parameter == pytest.approx(stack.bits_per_parameter, rel=0.05)


def test_a_stack_is_no_matrix_and_a_matrix_no_stack() -> None:
    stack = quantize(torch.randn(2, 4, 8))
    with pytest.raises(UsageError, match=r"take one expert with index\(e\)"):
        stack.linear(torch.randn(3, 8))
    with pytest.raises(UsageError, match="no expert 2"):
        stack.index(2)
    with pytest.raises(UsageError, match="no expert 0"):
        stack.index(0).index(0)


def test_another_dtype_keeps_the_codes_and_decodes_as_if_quantised_in_it() -> None:
    stored = quantize(torch.randn(8, 64))
    other = stored.to(dtype=torch.bfloat16)
    assert other.codes is stored.codes
    assert other.absmax is stored.absmax
    assert other.dtype == torch.bfloat16
    assert torch.equal(other.dequantize(), stored.dequantize().bfloat16())
    assert quantize(torch.randn(8, 64), dtype=torch.float16).dtype == torch.float16


def test_another_device_takes_everything_along() -> None:
    moved = quantize(torch.randn(8, 64)).to("meta")
    parts: list[Any] = [moved.codes, moved.absmax, moved.nested_absmax, moved.offset]
    assert {part.device.type for part in parts} == {"meta"}
    assert moved.device.type == "meta"


def test_a_frozen_weight_never_asks_for_a_gradient() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    stored = quantize(weight)
    assert stored.requires_grad is False
    assert not stored.dequantize().requires_grad


def test_an_input_of_another_dtype_is_refused() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        quantize(torch.randn(8, 64).bfloat16()).linear(torch.randn(3, 64))
