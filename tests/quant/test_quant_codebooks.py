"""Codebooks and the 8-bit maps: bitsandbytes' values, and the nearest of them is always chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.quant.blockwise import dequantize_blockwise, quantize_blockwise
from veneer.quant.codebooks import codebook, decision_bounds, dynamic_map, pair_table

CPU = torch.device("cpu")


def test_the_codebooks_have_the_published_values() -> None:
    nf4 = codebook("nf4", CPU).tolist()
    assert nf4[:3] == [-1.0, -0.6961928009986877, -0.5250730514526367]
    assert nf4[7:9] == [0.0, 0.07958029955625534]
    assert nf4[15] == 1.0
    twelfths = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert (codebook("fp4", CPU)[:8] * 12).tolist() == pytest.approx(twelfths)
    assert torch.equal(codebook("fp4", CPU)[8:], -codebook("fp4", CPU)[:8])
    assert (codebook("int4", CPU) * 7).round().tolist() == list(range(-8, 8))


def test_the_dynamic_maps_have_the_published_values() -> None:
    signed, unsigned = dynamic_map(True, CPU), dynamic_map(False, CPU)
    places = torch.tensor([0, 1, 100, 126, 127, 128, 200, 254, 255])
    assert signed[places].tolist() == [
        -0.992968738079071,
        -0.9789062738418579,
        -0.0074687497690320015,
        -5.500000384017767e-07,
        0.0,
        5.500000384017767e-07,
        0.23359374701976776,
        0.992968738079071,
        1.0,
    ]
    assert unsigned[[0, 1, 2, 100, 200, 254, 255]].tolist() == [
        0.0,
        3.2500003044333425e-07,
        7.749999895168003e-07,
        0.06273438036441803,
        0.6167968511581421,
        0.9964843988418579,
        1.0,
    ]
    assert all((m[1:] > m[:-1]).all() and len(m) == 256 for m in (signed, unsigned))


def test_codebooks_and_maps_are_those_of_bitsandbytes_to_the_last_bit() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the oracle is not installed")
    for scheme in ("nf4", "fp4"):
        assert torch.equal(codebook(scheme, CPU), functional.get_4bit_type(scheme, device="cpu"))
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed, CPU), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4"])
def test_bounds_lie_halfway_between_neighbouring_values(scheme: str) -> None:
    bounds, order = decision_bounds(scheme, CPU)
    values = codebook(scheme, CPU).sort().values
    assert torch.equal(bounds, (values[1:] + values[:-1]) / 2)
    assert (order is None) == (scheme != "fp4")
    if order is not None:
        assert torch.equal(codebook(scheme, CPU)[order.long()], values)


def test_a_byte_stands_for_its_high_nibble_first() -> None:
    pairs = pair_table("nf4", CPU).view(torch.float32).view(256, 2)
    assert pairs[0x1F].tolist() == [codebook("nf4", CPU)[1].item(), codebook("nf4", CPU)[15].item()]


def nearest(values: Tensor, signed: bool) -> Tensor:
    """What each value of one block becomes, by trying all 256."""
    scale = values.abs().max()
    book = dynamic_map(signed, CPU).double() * scale
    return book[(values.double()[:, None] - book).abs().argmin(dim=1)]


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_take_the_nearest_value_of_the_map(signed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(256) ** 3
    values = values if signed else values.abs()
    codes, absmax = quantize_blockwise(values, signed)
    decoded = dequantize_blockwise(codes, absmax, signed).double()
    got, best = (values - decoded).abs(), (values - nearest(values, signed)).abs()
    assert torch.allclose(got, best, rtol=1e-5, atol=1e-7 * values.abs().max().item())


def test_eight_bit_blocks_have_256_values_and_the_last_may_be_shorter() -> None:
    values = torch.linspace(-3, 5, 600)
    codes, absmax = quantize_blockwise(values)
    assert codes.shape == (600,)
    assert absmax.tolist() == [values[:256].abs().max(), values[256:512].abs().max(), values[512:].abs().max()]
    whole = dequantize_blockwise(codes, absmax)
    assert torch.equal(dequantize_blockwise(codes[300:], absmax[1:], skip=300 - 256), whole[300:])


@pytest.mark.parametrize("scale", [1.0, 1e-39, 3e38, 0.0])
def test_eight_bits_on_the_grid_are_the_bytes_of_bitsandbytes(scale: float) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the oracle is not installed")
    torch.manual_seed(0)
    values = torch.rand(256 * 300 + 77).mul_(2).sub_(1) ** 3 * scale
    codes, state = functional.quantize_blockwise(values, blocksize=256)
    ours, absmax = quantize_blockwise(values, grid=True)
    assert torch.equal(ours, codes)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(dequantize_blockwise(ours, absmax), functional.dequantize_blockwise(codes, state))
