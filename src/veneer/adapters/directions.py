"""An update beside the weight that it changes: sizes, and the leading directions that are new to the base.

Everything is products with the weight and the factors: no decomposition of a whole weight.
Names: ``k`` leading directions that are looked at, ``c`` columns, ``m`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.spectrum import Update

LOOKED_AT = 10  # leading singular vectors of the adapted weight; Shuttleworth et al. look at as many
NEW_BELOW = 0.5  # the cosine with every vector of the base's, below which one of them is new
_MOST_STEPS, _CHECKED_EVERY, _EXACT_UP_TO = 96, 16, 64  # Lanczos steps; the last: the space is exhausted
_BETWEEN = 7  # points between two nodes at which masses are bounded
_KRYLOV_BLOCKS = 10
_OVERSAMPLING = 6

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AgainstBase:
    """An update beside the weight that it changes."""

    base_norm: float  # Frobenius
    base_spectral_norm: float
    change_norm: float  # Frobenius, of all that the adapter changes: with DoRA its magnitudes too
    cosines: tuple[float, ...]  # of each leading vector of the adapted weight: at most this with any of the base's
    row_scale: float | None = None  # DoRA: mean of |g - 1|, by what the rows are scaled

    @property
    def new_directions(self) -> int:
        """How many of the leading vectors are none of the base's."""
        return sum(cosine < NEW_BELOW for cosine in self.cosines)


def against_base(update: Update, weight: Tensor, *, directions: int = LOOKED_AT) -> AgainstBase:
    """Norms, and the "intruder dimensions" of Shuttleworth et al. 2024 (arXiv 2410.21228, definition 1).

    A leading left singular vector of the adapted weight is new where its cosine with every left singular vector of the
    base's weight is small.

    Args:
        weight: ``[out, in]`` of the base, in float32 or float64.
        directions: how many leading vectors are looked at; 0: norms alone.
    """
    A, B = (factor.to(weight.device, weight.dtype) for factor in (update.A, update.B))
    B = update.scaling * B
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
    cross = 2 * ((weight @ A.t()) * B).sum(1).double()
    own = ((B @ (A @ A.t())) * B).sum(1).double()
    scale = None
    if update.magnitude is not None:
        scale = update.magnitude.to(weight.device).double() / (rows + cross + own).clamp(min=0).sqrt()
    g = torch.ones_like(rows) if scale is None else scale
    # |(g - 1) W + g s B A|^2, row by row
    change = ((g - 1).square() * rows + (g - 1) * g * cross + g.square() * own).sum().clamp(min=0)

    def times(x: Tensor) -> Tensor:
        return g.to(weight.dtype)[:, None] * (weight @ x + B @ (A @ x))

    def transposed(y: Tensor) -> Tensor:
        scaled = g.to(weight.dtype)[:, None] * y
        return weight.t() @ scaled + A.t() @ (B.t() @ scaled)

    cosines: tuple[float, ...] = ()
    if directions:
        U, S = leading(times, transposed, weight.shape, directions, like=weight)
        U = U[:, max(weight.shape) * torch.finfo(S.dtype).eps * S[0] < S]  # a weight of lower rank has no others
        cosines = tuple(largest_cosines(weight, U).tolist())
    base_S = leading(lambda x: weight @ x, lambda y: weight.t() @ y, weight.shape, 1, like=weight)[1]
    return AgainstBase(
        base_norm=float(rows.sum().sqrt()),
        base_spectral_norm=float(base_S[0]),
        change_norm=float(change.sqrt()),
        cosines=cosines,
        row_scale=None if scale is None else float((scale - 1).abs().mean()),
    )


def leading(
    times: Product, transposed: Product, shape: Sequence[int], k: int, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The ``k`` leading left singular vectors and values of a matrix that is known by its products.

    Block Krylov iteration (Musco & Musco 2015): more exact than subspace iteration at the same number of products, and
    exact where the Krylov space is the whole space.

    Args:
        times: ``x [in, c]`` to ``M x [out, c]``; transposed: ``y [out, c]`` to ``M^T y [in, c]``.
        shape: of the matrix, ``(out, in)``.
        like: gives the dtype and device.

    Returns:
        ``[out, min(k, out, in)]`` and its singular values, falling.
    """
    smaller = min(shape)
    width = min(k + _OVERSAMPLING, smaller)
    seed = torch.Generator().manual_seed(0)
    block = torch.randn(shape[1], width, generator=seed, dtype=like.dtype).to(like.device)
    blocks: list[Tensor] = []
    for _ in range(min(_KRYLOV_BLOCKS, -(-smaller // width))):
        block = torch.linalg.qr(transposed(times(block)))[0]
        blocks.append(block)
    space = torch.linalg.qr(torch.cat(blocks, dim=1)[:, : shape[1]])[0]
    U, S, _ = torch.linalg.svd(times(space), full_matrices=False)
    return U[:, : min(k, smaller)], S[: min(k, smaller)]


def largest_cosines(weight: Tensor, U: Tensor) -> Tensor:
    """``[k]`` float64: for each column ``u`` of ``U [out, k]`` its largest cosine with a left singular vector of W.

    The squared cosines are the masses of the spectral measure of ``W W^T`` at ``u``. Lanczos steps from ``W^T u`` give
    its quadrature (Golub & Meurant 1994): a mass is at most ``1 / sum p_j(x)^2`` over the orthonormal polynomials
    (Christoffel), and this bound falls to the mass itself as the steps go on. So no singular vector of W is needed, and
    what of ``u`` lies outside of W's range matches none. Where the steps exhaust the space, the result is the cosine,
    else it is at least that: a direction that is spread over many of W's vectors shows as a small number, not as zero.
    The steps end when each bound is below :data:`NEW_BELOW` or belongs to a singular vector that has been found.
    """
    eps = torch.finfo(weight.dtype).eps
    start = weight.t() @ U  # [in, k]
    mass = start.double().square().sum(0)
    limit = min(weight.shape)
    basis = start.new_empty(min(_MOST_STEPS, limit), *start.shape)
    T = torch.zeros(U.shape[1], _MOST_STEPS, _MOST_STEPS, dtype=torch.float64, device=U.device)
    exhausted = torch.zeros_like(mass, dtype=torch.bool)
    largest = torch.zeros_like(mass)
    vector = start / start.norm(dim=0).clamp(min=torch.finfo(start.dtype).tiny)
    for step in range(min(_MOST_STEPS, limit)):
        basis[step] = vector
        image = weight.t() @ (weight @ vector)
        largest = torch.maximum(largest, image.norm(dim=0).double())
        T[:, step, step] = (vector * image).double().sum(0)
        known = basis[: step + 1]
        for _ in range(2):  # once does not make it orthogonal
            image = image - torch.einsum("jik,jk->ik", known, torch.einsum("jik,ik->jk", known, image))
        size = image.norm(dim=0)
        ended = (size.double() <= 100 * eps * largest) | (step + 1 == limit)
        exhausted |= ended
        is_check = (step + 1) % _CHECKED_EVERY == 0 and limit > _EXACT_UP_TO
        if is_check or exhausted.all() or step + 1 == _MOST_STEPS:
            masses, found = _largest_masses(T[:, : step + 1, : step + 1], size.double(), exhausted, 100 * eps)
            cosines = (mass * masses).clamp(max=1.0).sqrt()
            if (found | (cosines < NEW_BELOW)).all():
                break
        if step + 1 < _MOST_STEPS:
            T[:, step, step + 1] = T[:, step + 1, step] = torch.where(ended, 0.0, size.double())
            vector = image / torch.where(ended, torch.inf, size)
    return cosines


def _largest_masses(T: Tensor, size: Tensor, exhausted: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The bound on each measure's largest mass over its node, and whether it is that of a vector that has been found.

    Args:
        T: ``[k, m, m]`` tridiagonal, rows and columns of zeros after the space is exhausted.
        size: ``[k]``, of what the next step would begin with.
        exhausted: ``[k]``: the nodes are all there is.
        eps: nodes below this share of the largest one are zero.
    """
    nodes, vectors = torch.linalg.eigh(T)  # [k, m], rising
    real = nodes > eps * nodes[:, -1:]
    at_nodes = torch.where(real, vectors[:, 0].square() / nodes, 0.0)
    # Between two nodes the polynomials at x are (T - x)^-1 e_m, scaled so that the first one is 1.
    parts = torch.arange(1, _BETWEEN + 1, dtype=torch.float64, device=T.device) / (_BETWEEN + 1)
    x = nodes[:, :-1, None] + parts * nodes.diff(dim=1)[..., None]  # [k, m - 1, between]
    last = vectors[:, -1, None, None] / (nodes[:, None, None] - x[..., None])  # [k, m - 1, between, m]
    polynomials = last.square().sum(-1) / (vectors[:, 0, None, None] * last).sum(-1).square()
    open_gaps = (real[:, :-1] & ~exhausted[:, None])[..., None]
    between = torch.where(open_gaps, 1 / (x * polynomials), 0.0).nan_to_num(0.0).flatten(1)
    largest, which = at_nodes.max(1)
    # A Ritz vector is near a singular one where its residual is small against the distance to the next node.
    residual = size * vectors[:, -1].gather(1, which[:, None]).squeeze(1).abs()
    far = torch.full_like(nodes[:, :1], torch.inf)
    gaps = torch.minimum(torch.cat([far, nodes.diff(dim=1)], 1), torch.cat([nodes.diff(dim=1), far], 1))
    found = exhausted | (residual < 0.1 * gaps.gather(1, which[:, None]).squeeze(1))
    return torch.cat([largest[:, None], between], dim=1).amax(1), found
