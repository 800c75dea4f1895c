"""The largest singular triplets of a matrix, exactly or by random projections.

    M ~ U diag(S) V^T        U [m, r], S [r] falling, V [n, r]

Exactly: eigenvectors of the smaller Gram matrix in float64, then the singular values of ``M`` in their span. Forming
``M^T M`` squares the condition number, which in float64 still leaves a float32 matrix all of its digits, and takes a
third of the time of an SVD in float32.

By projections (Halko et al. 2011, algorithms 4.4 and 5.1): an orthonormal basis of ``(M M^T)^q M R`` for a random ``R``
with ten columns more than are wanted, then the SVD of ``M`` in that basis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

OVERSAMPLING = 10
_SMALL = 1024

Triplets = tuple[Tensor, Tensor, Tensor]


def exact_triplets(matrix: Tensor, r: int) -> Triplets:
    """``(U, S, V)`` of ``matrix [m, n]`` in float64; ``r <= min(m, n)``; V's largest entries are above 0."""
    M = matrix.double()
    with _threads_for(min(M.shape)):
        if M.shape[0] < M.shape[1]:
            return _signed(*_flip(_in_span(M.t(), _eigenvectors(M @ M.t(), r))))
        return _signed(*_in_span(M, _eigenvectors(M.t() @ M, r)))


def random_triplets(matrix: Tensor, r: int, rounds: int, generator: torch.Generator) -> Triplets:
    """As :func:`exact_triplets`, near them: nearer with more ``rounds`` q, and the faster the singular values fall.

    Args:
        generator: of the random projection; on the CPU.
    """
    M = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    columns = min(r + OVERSAMPLING, *M.shape)
    start = torch.randn(M.shape[1], columns, generator=generator, dtype=M.dtype).to(M.device)
    basis = _orthonormal(M @ start)
    for _ in range(rounds):
        basis = _orthonormal(M @ _orthonormal(M.t() @ basis))
    U, S, V = _flip(_in_span(M.t(), basis))
    return _signed(U[:, :r], S[:r], V[:, :r])


@contextlib.contextmanager
def _threads_for(size: int) -> Iterator[None]:
    """One thread for eigenvectors of a small matrix: several spend their time on waiting for each other."""
    before = torch.get_num_threads()
    if size <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _eigenvectors(gram: Tensor, r: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -r:]


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _in_span(M: Tensor, basis: Tensor) -> Triplets:
    """The triplets of ``M`` with right vectors in the span of ``basis [n, k]``; orthonormal where M is singular too."""
    U, S, rotation = torch.linalg.svd(M @ basis, full_matrices=False)
    return U, S, basis @ rotation.t()


def _flip(triplets: Triplets) -> Triplets:
    U, S, V = triplets
    return V, S, U


def _signed(U: Tensor, S: Tensor, V: Tensor) -> Triplets:
    """Vectors are known up to their sign, which differs between machines: this one is the same on all."""
    signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return U * signs, S, V * signs
