"""Quantising: golden bytes, bitsandbytes' bytes, the nearest code, bounded memory, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.errors import ModelError, UsageError
from veneer.quant import QuantConfig, quantize
from veneer.quant.codebooks import codebook
from veneer.quant.config import BLOCK_SIZES

# 66 weights of 3 rows: two blocks of 32 and a short one.
WEIGHT = (((torch.arange(66) * 37) % 101 - 50).float() / 64).view(3, 22)
ABSMAX = [0.78125, 0.765625, 0.5]
BYTES = {
    "nf4": "04c16e29f3b05d17e29f3c05d18e2af4c16e19f3b05d17e29f3b05d18e2af4c05f",
    "fp4": "bf5a92a63c4be5a02d63c4be2a12d73f5b92a63d4bf5a92d63c4be2a12d73c5be3",
}
INT8 = (
    "81df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc3a98f654b10f6dcb2986e4429efd5db71777d1318beb4ba50565"
    "bf1f7fd93993f353"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional", reason="the oracle is not installed")


def unpacked(codes: Tensor, count: int) -> Tensor:
    """``[count]``: the codes one by one."""
    flat = codes.view(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count].long()


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_golden_bytes(scheme: str) -> None:
    stored = quantize(WEIGHT, QuantConfig(scheme, 32, double_quant=False))
    assert bytes(stored.codes.view(-1).tolist()).hex() == BYTES[scheme]
    assert stored.codes.shape == (33, 1)
    assert stored.absmax.tolist() == ABSMAX
    assert stored.nested_absmax is None
    twice = quantize(WEIGHT, QuantConfig(scheme, 32))
    assert torch.equal(twice.codes, stored.codes)
    assert twice.absmax.tolist() == [222, 216, 0]
    assert twice.nested_absmax is not None
    assert twice.offset is not None
    assert twice.nested_absmax.tolist() == [0.1822916865348816]
    assert twice.offset.item() == 0.6822916865348816


def test_golden_bytes_of_int8() -> None:
    stored = quantize(WEIGHT, QuantConfig("int8"))
    assert bytes(stored.codes.view(torch.uint8).view(-1).tolist()).hex() == INT8
    assert stored.absmax.tolist() == [0.78125, 0.78125, 0.765625]


SHAPES = [(96, 200), (7, 9), (1, 1), (3, 33, 10), (64, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(scheme: str, block_size: int, dtype: torch.dtype) -> None:
    oracle = bitsandbytes()
    for shape in SHAPES:
        for size in (0.02, 1e-30, 1e-39, 1e33):
            weight = torch.randn(shape) * size
            weight.view(-1)[: block_size // 2] = 0
            weight.view(-1)[-1:] = 0 if size == 0.02 else size
            if not weight.to(dtype).isfinite().all():
                continue  # too large for float16
            for double_quant in (False, True):
                codes, state = oracle.quantize_4bit(
                    weight.to(dtype), blocksize=block_size, quant_type=scheme, compress_statistics=double_quant
                )
                ours = quantize(weight.to(dtype), QuantConfig(scheme, block_size, double_quant))
                assert torch.equal(ours.codes, codes)
                assert torch.equal(ours.absmax, state.absmax)
                if double_quant:
                    assert torch.equal(ours.nested_absmax, state.state2.absmax)  # type: ignore[arg-type]  # not None
                    assert torch.equal(ours.offset, state.offset)  # type: ignore[arg-type]  # not None


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_blocks_of_zeros_are_those_of_bitsandbytes_and_decode_to_zeros(scheme: str) -> None:
    oracle = bitsandbytes()
    weight = torch.zeros(5, 33)  # two whole blocks and a short one
    codes, state = oracle.quantize_4bit(weight, quant_type=scheme)
    ours = quantize(weight, QuantConfig(scheme, double_quant=False))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dequantize(), weight)
    assert quantize(weight, QuantConfig(scheme)).dequantize().abs().max() < 1e-37
    some = torch.zeros(4, 64)
    some[2] = torch.linspace(-1, 1, 64)
    assert (quantize(some, QuantConfig(scheme, double_quant=False)).dequantize()[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_codes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 77).to(dtype)
    codes, scales, _ = bitsandbytes().int8_vectorwise_quant(weight.half())
    ours = quantize(weight, QuantConfig("int8"))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, scales)


def test_int8_rows_of_zeros_and_of_the_smallest_numbers_stay_what_they_are() -> None:
    weight = torch.zeros(3, 8)
    weight[1, 3] = 1e-40
    decoded = quantize(weight, QuantConfig("int8")).dequantize()
    assert (decoded[[0, 2]] == 0).all()
    assert decoded[1, 3].item() == pytest.approx(1e-40, rel=1e-4)


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4"])
def test_every_weight_gets_the_nearest_code(scheme: str) -> None:
    weight = torch.randn(30, 64)
    stored = quantize(weight, QuantConfig(scheme, double_quant=False))
    book = codebook(scheme, weight.device)
    if scheme == "int4":
        book = book[1:]  # -8 is never written
    scale = weight.abs().amax(dim=1, keepdim=True)
    best = (weight[:, :, None] / scale[:, :, None] - book).abs().amin(dim=2)
    got = (weight - stored.dequantize()).abs() / scale
    assert torch.allclose(got, best, rtol=0, atol=1e-6)


def test_int4_is_symmetric() -> None:
    weight = torch.randn(30, 64)
    config = QuantConfig("int4")
    assert torch.equal(quantize(-weight, config).dequantize(), -quantize(weight, config).dequantize())
    assert unpacked(quantize(weight, config).codes, weight.numel()).min() == 1


def test_nf4_is_closer_to_normal_weights_than_fp4_and_int4() -> None:
    weight = torch.randn(512, 512)
    errors = {s: (quantize(weight, QuantConfig(s)).dequantize() - weight).square().mean() for s in BYTES | {"int4": ""}}
    assert errors["nf4"] < errors["int4"] < errors["fp4"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_the_piece_that_is_encoded_at_a_time_does_not_change_a_bit(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(130, 301)
    whole = quantize(weight, QuantConfig(scheme))
    monkeypatch.setattr("veneer.quant.encode.CHUNK", 4096)
    pieces = quantize(weight, QuantConfig(scheme))
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.absmax, whole.absmax)


@pytest.mark.parametrize(("scheme", "encoder"), [("nf4", "encode_4bit"), ("int8", "encode_int8")])
def test_never_more_than_a_piece_is_widened_to_float32(
    scheme: str, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer.quant.encode as module

    sizes: list[int] = []
    original: Callable[..., Any] = getattr(module, encoder)

    def spy(values: Tensor, *rest: Any) -> Any:
        sizes.append(values.numel())
        return original(values, *rest)

    monkeypatch.setattr(module, encoder, spy)
    quantize(torch.randn(3, 1 << 20, dtype=torch.bfloat16), QuantConfig(scheme))
    assert sum(sizes) == 3 << 20
    assert max(sizes) * 25 < 40e6  # bytes on the way


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (QuantConfig(), 4.127),
        (QuantConfig(double_quant=False), 4.5),
        (QuantConfig("fp4", 128), 4.0635),
        (QuantConfig(block_size=32, double_quant=False), 5.0),
        (QuantConfig("int4", 4096, double_quant=False), 4.0078),
        (QuantConfig("int8"), 8.0 + 32 / 2048),
    ],
)
def test_bits_per_parameter_are_measured(config: QuantConfig, bits: float) -> None:
    stored = quantize(torch.randn(1024, 2048), config)
    assert stored.bits_per_parameter == pytest.approx(bits, abs=5e-4)
    held = [t for t in (stored.codes, stored.absmax, stored.nested_absmax, stored.offset) if t is not None]
    assert stored.nbytes == sum(t.untyped_storage().nbytes() for t in held)


def test_scales_too_large_to_be_summed_are_still_right() -> None:
    weight = torch.randn(64, 64) * 1e37  # bitsandbytes makes NaN of it
    decoded = quantize(weight).dequantize()
    assert (decoded - weight).abs().max() < 0.3 * weight.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("place", [0, 70, 98])
def test_nan_and_infinity_are_refused_with_the_name(scheme: str, bad: float, place: int) -> None:
    weight = torch.randn(9, 11)
    weight.view(-1)[place] = bad
    with pytest.raises(ModelError, match="NaN or infinity") as caught:
        quantize(weight, QuantConfig(scheme, 32), "model.layers.3.mlp.up_proj.weight")
    assert caught.value.where == "model.layers.3.mlp.up_proj.weight"
    assert caught.value.fix


@pytest.mark.parametrize("weight", [torch.randn(8), torch.ones(4, 4, dtype=torch.int64), torch.randn(0, 4)])
def test_what_is_no_weight_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(UsageError, match="only a floating weight of 2 or 3 dimensions"):
        quantize(weight, name="a.b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "nf5"}, "Did you mean 'nf4'"),
        ({"scheme": "gptq"}, "use one of nf4, fp4, int4, int8"),
        ({"block_size": 48}, "a power of two from 32 to 4096"),
        ({"block_size": 16}, "a power of two from 32 to 4096"),
        ({"block_size": 8192}, "a power of two from 32 to 4096"),
        ({"block_size": 64.0}, "a power of two from 32 to 4096"),
        ({"double_quant": "yes"}, "true or false"),
    ],
)
def test_a_wrong_config_says_what_would_be_right(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantConfig(**arguments)
    assert message in str(caught.value)


def test_a_weight_that_is_not_contiguous_is_quantised_as_it_reads() -> None:
    weight = torch.randn(40, 64)
    turned = weight.t()
    assert torch.equal(quantize(turned).codes, quantize(turned.contiguous()).codes)
