"""Codes in 4 or 8 bits to numbers on a GPU, in one Triton kernel each: every byte of codes is read once.

4 bits (Dettmers et al. 2023, "QLoRA", eq. 4 to 6), for weight ``i`` of the flat tensor in block ``i // b``:

    scale = absmax[block]                                                 or, under double quantisation,
    scale = dynamic_map[absmax[block]] * nested_absmax[block // 256] + offset
    w     = codebook[code] * scale

8 bits: ``w = code * absmax[row] / 127``. Each step is rounded in float32, as in the plain decoding in ``quant``, and
the result once to the output's dtype: the bits are the same. So no multiply-add is fused, which would skip a rounding.

The bound is memory: half a byte comes in per weight and two go out. So a thread takes words of 4 bytes, of which each
lies in one block, and writes a word's 8 weights in one store of 16 bytes (of 16-bit numbers); a warp reads and writes
without gaps. The 16 values lie in shared memory in a bank each, so a look-up is one load without conflicts. That makes
12 to 13 instructions per weight, counted in the code for sm_80 and sm_90; an H100 can issue 21 in the time in which its
memory moves a weight. Selecting among 16 registers takes 15 more, and a table of pairs, looked up by the whole byte,
halves the loads but has them collide in the banks.
"""

from __future__ import annotations

import torch
import triton  # not on every machine
import triton.language as tl
from torch import Tensor

WORDS = 1024  # words of 8 weights that a program decodes: 4 for each of its threads, all in flight at once
COLUMNS = 2048  # 8-bit codes that a program decodes
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    out: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    first: int = 0,
    stride: int = 0,
) -> Tensor:
    """Decodes equal pieces of a flat tensor, one for each row of ``out``: row ``r`` begins at ``first + r * stride``.

    Args:
        codes: ``[(n + 1) // 2]`` uint8 contiguous, the even index in the high nibble.
        absmax: ``[ceil(n / block_size)]`` float32, or uint8 with ``nested``.
        codebook: ``[16]`` float32.
        block_size: a power of two from 8 on.
        out: ``[R, C]`` contiguous, of any floating dtype.
        nested: ``dynamic_map [256]``, ``nested_absmax [ceil(blocks / 256)]``, ``offset []``, all float32; or None.
        first: where row 0 begins, in weights.
        stride: from the beginning of a row to the next, in weights.

    Returns:
        ``out``.
    """
    rows, columns = out.shape
    whole = first % 8 == 0 and columns % 8 == 0 and stride % 8 == 0
    chunks = triton.cdiv(columns + (0 if whole else 7), 8 * WORDS)
    if out.numel():
        dynamic_map, nested_absmax, offset = nested or (codebook, codebook, codebook)  # not read without
        with torch.cuda.device(out.get_device()):
            _decode_4bit[(rows * chunks,)](
                codes,
                absmax,
                dynamic_map,
                nested_absmax,
                offset,
                codebook,
                out,
                first,
                stride,
                columns,
                chunks,
                BLOCK_WORDS=block_size // 8,
                NESTED=nested is not None,
                WHOLE=whole,
                WORDS=WORDS,
                **OPTIONS,
            )
    return out


def dequantize_int8(codes: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """Decodes a matrix with a scale per row.

    Args:
        codes: ``[R, C]`` int8; its rows may lie apart.
        absmax: ``[R]`` float32, each row's largest magnitude.
        out: ``[R, C]`` contiguous, of any floating dtype.

    Returns:
        ``out``.
    """
    rows, columns = out.shape
    chunks = triton.cdiv(columns, COLUMNS)
    if out.numel():
        with torch.cuda.device(out.get_device()):
            _decode_int8[(rows * chunks,)](
                codes,
                absmax,
                out,
                codes.stride(0),
                columns,
                chunks,
                COLUMNS=COLUMNS,
                **OPTIONS,
            )
    return out


@triton.jit(do_not_specialize=["chunks"])  # type: ignore  # no types
def _decode_4bit(
    codes: tl.tensor,
    absmax: tl.tensor,
    dynamic_map: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    codebook: tl.tensor,
    out: tl.tensor,
    first: int,
    stride: int,
    columns: int,
    chunks: int,
    BLOCK_WORDS: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    # 64 bits for where the program begins, 32 within it; shifts and masks, since // and % would allow for minus.
    row = (tl.program_id(0) // chunks).to(tl.int64)
    past = (tl.program_id(0) % chunks).to(tl.int64) * WORDS  # words of the row that other programs decode
    start = first + row * stride
    stored = (start >> 3) + past  # the program's first word, in the whole tensor
    lead = 0 if WHOLE else (start & 7).to(tl.int32)  # weights of the row's first word that lie before the row
    left = columns + lead - past * 8
    word = tl.arange(0, WORDS)
    book = tl.load(codebook + tl.arange(0, 16))

    block = stored // BLOCK_WORDS
    later = ((stored & (BLOCK_WORDS - 1)).to(tl.int32) + word) // BLOCK_WORDS  # how many blocks after that one
    scale = tl.load(absmax + block + later, mask=word * 8 < left, other=0)
    if NESTED:
        scale = tl.load(dynamic_map + scale.to(tl.int32))  # a byte would count as signed
        group = (block >> 8) + ((block & 255).to(tl.int32) + later) // 256
        scale = scale * tl.load(nested_absmax + group, mask=word * 8 < left, other=0.0) + tl.load(offset)

    at = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    is_byte = (word * 8 < left)[:, None] if WHOLE else at * 2 < left
    byte = tl.load(codes + stored * 4 + at, mask=is_byte, other=0)
    code = tl.reshape(tl.join(byte >> 4, byte & 15), [WORDS * 8])
    value = tl.reshape(tl.gather(book, code.to(tl.int32), axis=0), [WORDS, 8]) * scale[:, None]

    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    is_weight = (word * 8 < left)[:, None] if WHOLE else (at < left) & (at + past * 8 >= lead)
    tl.store(out + row * columns + past * 8 - lead + at, value.to(out.dtype.element_ty), mask=is_weight)


@triton.jit(do_not_specialize=["chunks"])  # type: ignore  # no types
def _decode_int8(
    codes: tl.tensor, absmax: tl.tensor, out: tl.tensor, stride: int, columns: int, chunks: int, COLUMNS: tl.constexpr
) -> None:
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    code = tl.load(codes + row * stride + column, mask=inside, other=0)
    value = code.to(tl.float32) * tl.load(absmax + row) * (1 / 127)  # two roundings, in this order
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)
