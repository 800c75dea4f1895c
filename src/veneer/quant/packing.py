"""Between numbers and their bytes: two 4-bit codes in a byte, or one INT8 code. The arithmetic is bitsandbytes'.

A decoded weight is the float32 product of its code's value and its scale, rounded once to the wanted dtype.
Names: ``R`` rows and ``C`` columns of the piece at hand, ``b`` weights that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels import native
from veneer.quant.codebooks import codebook, decision_bounds, pair_table

# Weights decoded at a time on a CPU: their float32 values, 1 MB, stay in cache between the look-up, the product and the
# rounding. Half of it was slower by its calls, and more is no faster.
PIECE = 1 << 18

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
    (rows, half), groups = codes.shape, scales.shape[1]
    if not rows:
        return out
    if (
        native.can_take(out, function="decode4")
        and codes.device == scales.device == out.device
        and codes.stride(1) == scales.stride(1) == 1
    ):
        book = codebook(scheme, out.device)
        native.call("decode4", out, codes, scales, book, rows, half, groups, codes.stride(0), scales.stride(0))
        return out
    height = min(rows, max(1, PIECE // (2 * half))) if codes.device.type == "cpu" else rows
    table = pair_table(scheme, codes.device)
    index = torch.empty(height, half, dtype=torch.int32, device=codes.device)
    pairs = torch.empty(height * half, dtype=torch.int64, device=codes.device)
    values = pairs.view(torch.float32).view(height, groups, -1)
    whole = (codes, scales[:, :, None], out.view(rows, groups, -1))
    pieces = zip(*(torch.split(tensor, height) for tensor in whole))
    for some, scale, target in pieces:
        if (left := len(some)) < height:  # the last one
            index, pairs, values = index[:left], pairs[: left * half], values[:left]
        index.copy_(some)
        torch.index_select(table, 0, index.view(-1), out=pairs)
        if out.dtype == torch.float32:
            torch.mul(values, scale, out=target)
        else:
            target.copy_(values.mul_(scale))
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
