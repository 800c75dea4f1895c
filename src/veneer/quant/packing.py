"""Between numbers and their bytes: two 4-bit codes in a byte, or one INT8 code. The arithmetic is bitsandbytes'.

A decoded weight is the float32 product of its code's value and its scale, rounded once to the wanted dtype.
Names: ``R`` rows and ``C`` columns of the piece at hand, ``b`` weights that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.quant.codebooks import decision_bounds, pair_table

# Weights decoded at a time on a CPU: their float32 values (512 KB) and indices stay in the second-level cache.
PIECE = 1 << 17

# The smallest divisor of bitsandbytes, so that a block of zeros stays zero.
_TINY = 1e-38


def encode_4bit(values: Tensor, scheme: str, block_size: int) -> tuple[Tensor, Tensor]:
    """The nearest code of each value, in blocks scaled by their largest magnitude.

    Args:
        values: ``[n]`` float32. All blocks but the last are whole.
        scheme: ``nf4``, ``fp4`` or ``int4``.
        block_size: values that share a scale.

    Returns:
        codes ``[(n + 1) // 2]`` uint8, a value of even index in the high nibble; absmax ``[ceil(n / block_size)]``
        float32, NaN or infinite where a value is.
    """
    count = values.numel()
    whole = count - count % block_size
    blocks = values[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = values.new_zeros(count + count % 2)
    torch.mul(blocks, absmax.clamp(min=_TINY).reciprocal_()[:, None], out=scaled[:whole].view(-1, block_size))
    if whole < count:
        # bitsandbytes divides in the last, shorter block, where it multiplies by the reciprocal in the others, and
        # writes the smallest divisor as the scale of zeros.
        last = values[whole:].abs().amax().clamp(min=_TINY)
        torch.div(values[whole:], last, out=scaled[whole:count])
        absmax = torch.cat([absmax, last.view(1)])
    bounds, order = decision_bounds(scheme, values.device)
    places = torch.bucketize(scaled.clamp_(-1, 1), bounds, out_int32=True)
    codes = places.to(torch.uint8) if order is None else order.index_select(0, places)
    return (codes[::2] << 4) | codes[1::2], absmax


def decode_4bit(codes: Tensor, scales: Tensor, scheme: str, out: Tensor) -> Tensor:
    """What packed codes stand for, written into ``out``.

    A byte is looked up in a table of pairs: twice as fast as unpacking it, and still one product in float32.

    Args:
        codes: ``[R, C / 2]`` uint8; its rows may lie apart.
        scales: ``[R, C / b]`` float32; likewise.
        scheme: ``nf4``, ``fp4`` or ``int4``.
        out: ``[R, C]`` contiguous, of any floating dtype.
    """
    rows, half = codes.shape
    groups = scales.shape[1]
    step = max(1, PIECE // (2 * half)) if codes.device.type == "cpu" else rows
    table = pair_table(scheme, codes.device)
    index = torch.empty(min(step, rows) * half, dtype=torch.int32, device=codes.device)
    pairs = torch.empty(min(step, rows) * half, dtype=torch.int64, device=codes.device)
    for first in range(0, rows, step):
        piece = slice(first, min(first + step, rows))
        height = piece.stop - first
        index, pairs = index[: height * half], pairs[: height * half]
        index.view(height, half).copy_(codes[piece])
        torch.index_select(table, 0, index, out=pairs)
        values = pairs.view(torch.float32).view(height, groups, -1)
        target = out[piece].view(height, groups, -1)
        if out.dtype == torch.float32:
            torch.mul(values, scales[piece, :, None], out=target)
        else:
            target.copy_(values.mul_(scales[piece, :, None]))
    return out


def encode_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 127 even steps to either side of zero, scaled by each row's largest magnitude.

    Args:
        values: ``[R, C]`` float32.

    Returns:
        codes ``[R, C]`` int8; absmax ``[R]`` float32, NaN or infinite where a value is.
    """
    absmax = values.abs().amax(dim=1)
    scaled = (values * (127.0 / absmax)[:, None]).nan_to_num_(nan=0.0)  # 0 * inf: a row of zeros
    return scaled.round_().clamp_(-127, 127).to(torch.int8), absmax


def decode_int8(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """What INT8 codes stand for, written into ``out``.

    Args:
        codes: ``[R, C]`` int8.
        scales: ``[R]`` float32, each row's largest magnitude.
        out: ``[R, C]`` of any floating dtype.
    """
    # bitsandbytes multiplies by the reciprocal of 127 after the scale: two roundings, in this order.
    return out.copy_((codes * scales[:, None]).mul_(1 / 127))
