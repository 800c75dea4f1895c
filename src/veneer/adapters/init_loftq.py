"""LoftQ: the factors start at what the codes lose of the weight (Li et al. 2023, alg. 1).

    min over Q, A, B of || W - Q - s B A ||:    in turn  Q <- codes of W - s B A    and    s B A <- W - Q to rank r

With the scaling s in it, which PEFT leaves out (PEFT #1982). The first round takes the base's own codes, so that one
round gives a plain LoRA over the base as it is. More rounds need other codes, which the adapter then holds for itself:
:mod:`veneer.adapters.own_codes`. Rounding in blocks may undo a round, so the best one is kept: more never give a
larger error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.init_pissa import principal_factors
from veneer.quant import QuantizedTensor, quantize


@dataclass(frozen=True)
class LoftqStart:
    """Where a layer starts."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    codes: QuantizedTensor  # Q; the base's own after one round
    size: float  # ||W||^2
    before: float  # ||W - Q||^2 with the base's codes
    after: float  # ||W - Q - s B A||^2


@torch.no_grad()
def loftq(original: Tensor, base: QuantizedTensor, r: int, scaling: float, rounds: int) -> LoftqStart:
    """The best of ``rounds`` rounds.

    Args:
        original: ``[out, in]``, the weight before it was quantised.
        base: its codes.
    """
    W = original.to(base.device, torch.float32)
    Q, low_rank, best = base, torch.zeros_like(W), None
    before = float("nan")
    for done in range(rounds):
        if done:
            Q = quantize(W - low_rank, base.config, dtype=base.dtype)
        error = W - Q.dequantize().to(W.dtype)
        A, B = principal_factors(error, r, scaling)
        low_rank = (scaling * (B @ A)).to(W.dtype)
        after = float((error - low_rank).square().sum())
        if best is None:
            before = float(error.square().sum())
        if best is None or after < best.after:
            best = LoftqStart(A, B, Q, float(W.square().sum()), before, after)
    assert best is not None
    return best
