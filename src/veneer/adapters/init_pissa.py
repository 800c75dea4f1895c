"""PiSSA: the factors start as the principal part of the weight (Meng et al. 2024, eq. 2 to 4).

    W ~ U diag(S) V^T, its r largest triplets        A0 = diag(sqrt(S / s)) V^T        B0 = U diag(sqrt(S / s))

so that ``s B0 A0`` is the best approximation of W of rank r. What is left of W acts through the base, which is not
changed: :mod:`veneer.adapters.residual` takes ``s B0 A0`` off again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.adapters.init_svd import exact_triplets, random_triplets


def principal_factors(
    matrix: Tensor, r: int, scaling: float, rounds: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``A0 [r, in]`` and ``B0 [out, r]``: ``scaling * B0 A0`` is the part of ``matrix [out, in]`` of rank r.

    Args:
        rounds: of the randomised SVD (``pissa_niter_N``); None: exactly.
        generator: of the randomised SVD.
    """
    if rounds is None or generator is None:
        U, S, V = exact_triplets(matrix, r)
    else:
        U, S, V = random_triplets(matrix, r, rounds, generator)
    root = (S / scaling).sqrt()
    return (V * root).t(), U * root
