"""The Triton kernels give the bits of the plain decoding: under Triton's interpreter everywhere, and on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.quant import QuantConfig, QuantizedTensor, quantize
from veneer.quant.codebooks import codebook
from veneer.quant.config import BLOCK_SIZES
from veneer.quant.tensor import triton_kernels

FOUR_BIT = ["nf4", "fp4", "int4"]
# Whole words; blocks that cross rows; rows that begin inside a word; inside a byte; several nested groups; one weight.
SHAPES = [(6, 64), (17, 72), (5, 130), (7, 9), (40, 300), (1, 1)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The kernels' file once more, under Triton's interpreter, in small programs."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = importlib.util.find_spec("veneer.kernels.dequantize_triton")
    assert spec is not None
    assert spec.origin is not None
    copy = importlib.util.spec_from_file_location("interpreted_kernels", spec.origin)
    assert copy is not None
    assert copy.loader is not None
    module: Any = importlib.util.module_from_spec(copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        copy.loader.exec_module(module)
    module.WORDS, module.COLUMNS = 32, 64
    return module


def stored_and_decoded(shape: tuple[int, ...], config: QuantConfig, **options: Any) -> tuple[QuantizedTensor, Tensor]:
    """A random weight in codes, and what they stand for by the plain decoding."""
    stored = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))), config, **options)
    return stored, stored.dequantize()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_four_bits_are_decoded_to_the_same_bits(
    scheme: str, double_quant: bool, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = BLOCK_SIZES if scheme == "nf4" else (64,)
    cases = [stored_and_decoded(s, QuantConfig(scheme, b, double_quant)) for s in SHAPES for b in sizes]
    monkeypatch.setattr("veneer.quant.tensor.triton_kernels", lambda device_type: interpreted)
    for stored, want in cases:
        for dtype in (torch.float32, torch.float16) if stored.config.block_size == 64 else (torch.float32,):
            assert torch.equal(stored.to(dtype=dtype).dequantize(), want.to(dtype))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_numbers_in_bfloat16_come_from_the_same_float32_numbers(
    scheme: str, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, want = stored_and_decoded((17, 72), QuantConfig(scheme))
    monkeypatch.setattr("veneer.quant.tensor.triton_kernels", lambda device_type: interpreted)
    got = stored.to(dtype=torch.bfloat16).dequantize()
    # The interpreter of Triton 3.6 cuts the last 16 bits off, where a GPU rounds to nearest: the tests there cover it.
    assert torch.equal(got.view(torch.int16), (want.view(torch.int32) >> 16).to(torch.int16))


def test_eight_bits_are_decoded_to_the_same_bits(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [stored_and_decoded(shape, QuantConfig("int8")) for shape in [*SHAPES, (3, 200)]]
    monkeypatch.setattr("veneer.quant.tensor.triton_kernels", lambda device_type: interpreted)
    for stored, want in cases:
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(stored.to(dtype=dtype).dequantize(), want.to(dtype))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(9, 64), (9, 30), (9, 9), (40, 300), (3, 5, 12), (3, 7, 9)])
def test_any_rows_and_any_expert_of_a_stack_are_decoded_alone(
    scheme: str, shape: tuple[int, ...], interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, want = stored_and_decoded(shape, QuantConfig(scheme, 32))
    monkeypatch.setattr("veneer.quant.tensor.triton_kernels", lambda device_type: interpreted)
    for rows in (slice(0, 1), slice(2, 5), slice(3, None), slice(4, 4), slice(-1, None)):
        assert torch.equal(stored.dequantize(rows), want.view(-1, shape[-1])[rows])
    if len(shape) == 3:
        for e in range(shape[0]):
            assert torch.equal(stored.index(e).dequantize(), want[e])
            assert torch.equal(stored.index(e).dequantize(slice(1, 4)), want[e, 1:4])


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize(("shape", "tile"), [((9, 64), 1 << 20), ((9, 64), 1200), ((6, 36), 200), ((5, 9), 1 << 20)])
def test_both_products_are_those_of_the_decoded_weight_whatever_the_tile(
    scheme: str, shape: tuple[int, int], tile: int, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, weight = stored_and_decoded(shape, QuantConfig(scheme, 32), dtype=torch.float64)
    x, dy = torch.randn(3, shape[1], dtype=torch.float64), torch.randn(3, shape[0], dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64)
    monkeypatch.setattr("veneer.quant.tensor.triton_kernels", lambda device_type: interpreted)
    monkeypatch.setattr("veneer.quant.tensor.TILE_BYTES", tile)
    monkeypatch.setattr(interpreted, "WORDS", 2)  # several programs for a row of a tile
    torch.testing.assert_close(stored.linear(x, bias), F.linear(x, weight, bias), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stored.grad_input(dy), dy @ weight, rtol=1e-13, atol=1e-13)


def test_a_weight_behind_the_first_four_billion_is_found(interpreted: ModuleType) -> None:
    first, size = 2**32 + 4096 + 32, 4096
    codes = torch.empty(first // 2 + 64, dtype=torch.uint8)  # pages that nobody touches take no memory
    absmax = torch.empty(-(-2 * codes.numel() // size))
    tail, scales = torch.randint(256, (64,), dtype=torch.uint8), torch.rand(2)
    codes[-64:], absmax[-2:] = tail, scales
    book = codebook("nf4", codes.device)
    want = book[torch.stack([tail >> 4, tail & 15], dim=1).view(-1).long()] * scales[-1]
    got = interpreted.dequantize_4bit(codes, absmax, book, size, torch.empty(1, 128), first=first)
    assert torch.equal(got[0], want)
    got = interpreted.dequantize_4bit(codes, absmax, book, size, torch.empty(5, 3), first=5, stride=first // 4)
    assert torch.equal(got[4], want[5:8])


def test_nothing_is_written_beside_the_rows(interpreted: ModuleType) -> None:
    stored = quantize(torch.randn(7, 9))
    book = codebook("nf4", stored.device)
    scales = stored._scales(0, 1)
    canvas = torch.full((64,), torch.nan)
    out = canvas[20:38].view(2, 9)
    interpreted.dequantize_4bit(stored.codes, scales, book, 64, out, first=9, stride=18)
    assert torch.equal(out, stored.dequantize()[1:5:2])
    assert canvas[:20].isnan().all()
    assert canvas[38:].isnan().all()


def test_the_kernels_are_for_cuda_with_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_kernels("cpu") is None
    assert triton_kernels("mps") is None
    monkeypatch.delitem(sys.modules, "veneer.kernels.dequantize_triton", raising=False)
    monkeypatch.delattr("veneer.kernels.dequantize_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it was not installed
    assert triton_kernels.__wrapped__("cuda") is None


@pytest.mark.parametrize("arch", [80, 90])
def test_the_code_for_a_gpu_fuses_no_multiply_add_and_moves_whole_words(
    arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels: Any = triton_kernels.__wrapped__("cuda")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = kernels._decode_4bit
    pointers = {"codes": "*u8", "absmax": "*u8", "out": "*bf16"}
    pointers |= dict.fromkeys(("dynamic_map", "nested_absmax", "offset", "codebook"), "*fp32")
    sizes = {"first": "i64", "stride": "i32", "columns": "i64", "chunks": "i32"}
    constants = {"BLOCK_WORDS": 8, "NESTED": True, "WHOLE": True, "WORDS": kernels.WORDS}
    types = pointers | sizes | dict.fromkeys(constants, "constexpr")
    place = {name: (kernel.arg_names.index(name),) for name in types}
    even = {place[name]: [["tt.divisibility", 16]] for name in (*pointers, "first", "stride", "columns")}
    source = ASTSource(kernel, types, {place[name]: value for name, value in constants.items()}, even)
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernels.OPTIONS).asm["ptx"]
    per_thread = kernels.WORDS // (32 * kernels.OPTIONS["num_warps"])
    assert "fma." not in code
    assert "ftz" not in code
    assert re.findall(r"st\.global\.\S+", code) == ["st.global.v4.b32"] * per_thread
    assert len(re.findall(r"ld\.global\.b8", code)) == per_thread  # a scale for each word, and no codes byte by byte


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", [*FOUR_BIT, "int8"])
def test_a_gpu_decodes_to_the_bits_of_the_cpu(scheme: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    draw = random.Random(0)
    shapes = [(draw.randint(1, 300), draw.choice([1, 8, 16]) * draw.randint(1, 400)) for _ in range(12)]
    for shape, double_quant in itertools.product([*SHAPES, (3, 20, 72), (3, 7, 9), *shapes], (True, False)):
        stored, want = stored_and_decoded(shape, QuantConfig(scheme, draw.choice(BLOCK_SIZES), double_quant))
        moved = stored.to("cuda", dtype)
        assert torch.equal(moved.dequantize().cpu(), want.to(dtype))
        rows = slice(draw.randrange(shape[0]), None)
        assert torch.equal(moved.dequantize(rows).cpu(), want.to(dtype).view(-1, shape[-1])[rows])
        if len(shape) == 3:
            assert torch.equal(moved.index(1).dequantize().cpu(), want[1].to(dtype))


@needs_gpu
@pytest.mark.parametrize("tile", [1 << 27, 1 << 16])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_gpu_multiplies_with_the_decoded_weight(scheme: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.quant.tensor.TILE_BYTES_OFF_CPU", tile)
    for shape in [(300, 576), (300, 130), (77, 65)]:
        stored = quantize(torch.randn(shape), QuantConfig(scheme), dtype=torch.float64).to("cuda")
        weight = stored.dequantize()
        x, dy = torch.randn(5, shape[1]).to(weight), torch.randn(5, shape[0]).to(weight)
        torch.testing.assert_close(stored.linear(x), x @ weight.t(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stored.grad_input(dy), dy @ weight, rtol=1e-12, atol=1e-12)
