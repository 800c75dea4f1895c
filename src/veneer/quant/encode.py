"""From numbers to codes, in pieces, so that a tensor of any size costs a few tens of megabytes on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import ModelError, UsageError
from veneer.quant.blockwise import quantize_blockwise
from veneer.quant.config import QuantConfig
from veneer.quant.packing import encode_4bit, encode_int8
from veneer.quant.tensor import QuantizedTensor

# Weights encoded at a time: a multiple of every block size. About 25 bytes each are needed on the way.
CHUNK = 1 << 20


def quantize(
    weight: Tensor, config: QuantConfig | None = None, name: str = "", dtype: torch.dtype | None = None
) -> QuantizedTensor:
    """Stores a weight in codes. The same bytes as bitsandbytes' on a CPU, from the same numbers.

    INT8 rounds the weight's own numbers; bitsandbytes makes them float16 first, which changes codes of float32 weights
    here and there.

    Args:
        weight: ``[out, in]`` or ``[E, out, in]``, floating. One that is not contiguous is copied first.
        config: how to store it; None: NF4 in blocks of 64 with double quantisation.
        name: the tensor's name, for errors.
        dtype: what the result computes in; None: the weight's dtype.

    Raises:
        UsageError: the weight is not floating, or not of 2 or 3 dimensions.
        ModelError: it holds NaN or infinity.
    """
    config = config or QuantConfig()
    if not weight.is_floating_point() or weight.ndim not in (2, 3) or not weight.numel():
        what = f"only a floating weight of 2 or 3 dimensions can be quantised, not {weight.dtype} {tuple(weight.shape)}"
        raise UsageError(what, where=name or None, fix="leave this tensor as it is")
    flat = weight.detach().reshape(-1)
    codes, absmax = _encode_rows(flat, weight.shape) if config.scheme == "int8" else _encode_blocks(flat, config)
    if not bool(absmax.isfinite().all()):
        raise ModelError(
            "the weight holds NaN or infinity and cannot be quantised",
            where=name or None,
            fix="the checkpoint is damaged or its training diverged: fetch it again, or take another one",
        )
    nested, offset = None, None
    if config.double_quant and config.scheme != "int8":
        offset = absmax.mean()
        if offset.isinf():  # the sum overflowed: bitsandbytes makes such a weight NaN
            offset = absmax.double().mean().float()
        absmax, nested = quantize_blockwise(absmax - offset, grid=True)
    return QuantizedTensor(codes, absmax, nested, offset, config, weight.shape, dtype or weight.dtype)


def _encode_blocks(flat: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """codes ``[(n + 1) // 2, 1]`` uint8 and absmax ``[ceil(n / block_size)]`` float32 of ``flat [n]``."""
    count, size = flat.numel(), config.block_size
    codes = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // size), dtype=torch.float32, device=flat.device)
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        packed, scales = encode_4bit(flat[first:last].float(), config.scheme, size)
        codes[first // 2 : (last + 1) // 2, 0] = packed
        absmax[first // size : -(-last // size)] = scales
    return codes, absmax


def _encode_rows(flat: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """codes of ``shape`` int8 and absmax ``[rows]`` float32: one scale per row."""
    matrix = flat.view(-1, shape[-1])
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=flat.device)
    absmax = torch.empty(matrix.shape[0], dtype=torch.float32, device=flat.device)
    step = max(1, CHUNK // shape[-1])
    for first in range(0, matrix.shape[0], step):
        rows = slice(first, first + step)
        codes[rows], absmax[rows] = encode_int8(matrix[rows].float())
    return codes.view(shape), absmax
