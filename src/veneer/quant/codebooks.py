"""The values that codes stand for, as fractions of their block's scale, and the bounds between them.

NF4, FP4 and the dynamic 8-bit maps are bitsandbytes' to the last bit, in its order of codes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Quantiles of a standard normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E). Ascending.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# A sign bit, two bits of exponent and one of mantissa, over the largest value. Codes are bit patterns: not ascending.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

# Code k + 8 stands for k / 7, k = -7..7: symmetric, with an exact zero. Code 0 (-8) is never written.
_INT4 = tuple((code - 8) / 7 for code in range(16))


@functools.cache
def codebook(scheme: str, device: torch.device) -> Tensor:
    """``[16]`` float32 on ``device``: what each 4-bit code of ``nf4``, ``fp4`` or ``int4`` stands for."""
    if scheme == "fp4":
        magnitudes = torch.tensor(_FP4_MAGNITUDES, device=device) / max(_FP4_MAGNITUDES)
        return torch.cat([magnitudes, magnitudes * -1 + 0])  # + 0: code 8 is a plain zero, as in bitsandbytes
    return torch.tensor({"nf4": _NF4, "int4": _INT4}[scheme], device=device)


@functools.cache
def decision_bounds(scheme: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where a value goes to the next code: it does when it is above a bound, not when it is equal.

    Returns:
        ``[15]`` float32, the midpoints between neighbours; and ``[16]`` uint8, the codes in ascending order of their
        values, or None where they are ascending already.
    """
    values, order = codebook(scheme, device).sort(stable=True)
    ascending = bool((order[1:] > order[:-1]).all())
    return (values[:-1] + values[1:]) / 2, None if ascending else order.to(torch.uint8)


@functools.cache
def pair_table(scheme: str, device: torch.device) -> Tensor:
    """What a byte of two codes stands for: ``[256]`` int64, each the bits of two float32 values, high nibble first."""
    byte = torch.arange(256, device=device)
    return codebook(scheme, device)[torch.stack([byte >> 4, byte & 15], dim=1)].view(torch.int64).view(256)


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """A dynamic 8-bit map (Dettmers 2016, "8-bit approximations for parallelism in deep learning", sec. 3).

    Seven decades ``10^(i-6)``, i = 0..6, hold the midpoints of ``2^i`` equal steps from 0.1 to 1 with either sign
    (``2^(i+1)`` steps without signs), and there are 0 and 1. With signs, -1 is not among them: -0.993 is the lowest.

    Returns:
        ``[256]`` float32 on ``device``, ascending.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), device=device)
