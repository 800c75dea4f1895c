"""OLoRA: the factors start with an orthonormal B (Büyükakyüz 2024, sec. 3).

    W = Q R        B0 = the first r columns of Q        A0 = the first r rows of R

The first r columns of Q come from those of W alone, and ``A0 = B0^T W``: nothing else of the decomposition is needed.
As in the paper and in PEFT, the factors are not divided by the scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``A0 [r, in]`` and ``B0 [out, r]`` of ``weight [out, in]``; ``B0^T B0`` is the identity."""
    matrix = weight.double()
    B: Tensor = torch.linalg.qr(matrix[:, :r])[0]
    return B.t() @ matrix, B
