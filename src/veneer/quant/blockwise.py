"""Eight bits per value in blocks that share a float32 scale: what double quantisation does to a weight's scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.quant.codebooks import dynamic_map

NESTED_BLOCK = 256  # scales that share one nested scale; bitsandbytes reads no other


def quantize_blockwise(values: Tensor, signed: bool = True, grid: bool = False) -> tuple[Tensor, Tensor]:
    """Each value becomes the nearest entry of the dynamic map times the largest magnitude of its block of 256.

    Args:
        values: ``[n]`` float32, finite.
        signed: which map; without signs the values must not be negative.
        grid: move each scaled value to the nearest of 65,536 even steps from -1 to 1 first. bitsandbytes' CPU backend
            does, to look codes up in a table, so it is needed for the same bytes.

    Returns:
        codes ``[n]`` uint8, and absmax ``[ceil(n / 256)]`` float32.
    """
    count = values.numel()
    blocks = F.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    # The reciprocal of a subnormal scale overflows: bitsandbytes then gives inf the last code and 0 * inf the first.
    scaled = (blocks * absmax.reciprocal()[:, None]).nan_to_num_(nan=-1.0).clamp_(-1, 1)
    if grid:
        scaled = ((scaled + 1) * 32767.5 + 0.5).floor_() / 65535 * 2 - 1
    book = dynamic_map(signed, values.device)
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)
    codes[absmax == 0] = 0
    return codes.view(-1)[:count], absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool = True, skip: int = 0) -> Tensor:
    """What the codes stand for.

    Args:
        codes: ``[n]`` uint8.
        absmax: ``[ceil((skip + n) / 256)]`` float32.
        signed: which map.
        skip: how many codes of the first block lie before the first one here.

    Returns:
        ``[n]`` float32.
    """
    scales = absmax.repeat_interleave(NESTED_BLOCK)[skip : skip + codes.numel()]
    return dynamic_map(signed, codes.device).index_select(0, codes.to(torch.int32)).mul_(scales)
