"""The mathematics of looking at an update: its spectrum, its best smaller rank, and what it does to the base's own.

    dW = s B A = U S V^T      QR of B and of A^T, then the SVD of the small core  s R_B R_A^T   (never dW itself)

Cutting the smallest singular values off is the best approximation of that rank (Eckart & Young 1936).
Names: ``r`` rank, ``n`` directions that are kept, ``k`` leading directions that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapters.config import LoraConfig
from veneer.adapters.model import KEY_PREFIX
from veneer.adapters.targets import pattern_for
from veneer.errors import AdapterError

LOOKED_AT = 10  # leading singular vectors of the adapted weight; Shuttleworth et al. look at as many
NEW_BELOW = 0.5  # the cosine with every vector of the base's, below which one of them is new
_LANCZOS_STEPS = 48
_BETWEEN = 7  # points between two nodes at which masses are bounded
_KRYLOV_BLOCKS = 10
_OVERSAMPLING = 6

# The ends of the keys of two factors, by the kind of layer.
_FACTORS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight, ``scaling * B A``; an embedding's is that of its transposed matrix."""

    path: str  # of the layer in the base
    kind: str  # "linear" or "embedding"
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scaling: float
    magnitude: Tensor | None = None  # [out], DoRA's m: the row norms of the adapted weight
    expert: int | None = None  # in a stack of experts, which share their two tensors in the file

    @property
    def name(self) -> str:
        return self.path if self.expert is None else f"{self.path}[{self.expert}]"

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def keys(self) -> tuple[str, str]:
        """Of A and B in the file."""
        down, up = _FACTORS[self.kind]
        return f"{KEY_PREFIX}{self.path}.{down}", f"{KEY_PREFIX}{self.path}.{up}"


class Spectrum(NamedTuple):
    """The singular value decomposition of an update, float64."""

    U: Tensor  # [out, n], orthonormal columns
    S: Tensor  # [n], falling
    V: Tensor  # [in, n], orthonormal columns


def updates(config: LoraConfig, tensors: Mapping[str, Tensor], *, where: str) -> list[Update]:
    """The low-rank updates of an adapter's file, in the file's order; a stack of experts gives one for each.

    Args:
        config, tensors: as ``read_adapter`` gives them.
        where: the file, for errors.

    Raises:
        AdapterError: a value is not finite, a factor is alone, or the factors' rank is not the config's.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            fix = "the training went wrong, or the file is damaged: use an earlier checkpoint"
            raise AdapterError(f"tensor '{key}' has NaN or Inf in it", where=where, fix=fix)
    kinds: dict[str, str] = {}
    for key in tensors:
        for kind, ends in _FACTORS.items():
            for end in ends:
                if key.endswith(f".{end}"):
                    kinds[key.removeprefix(KEY_PREFIX).removesuffix(f".{end}")] = kind
    found: list[Update] = []
    for path, kind in kinds.items():
        pair = [tensors.get(f"{KEY_PREFIX}{path}.{end}") for end in _FACTORS[kind]]
        A, B = pair
        if A is None or B is None:
            fix = "copy the file again, or save the adapter again"
            raise AdapterError(f"the layer '{path}' has one factor of two", where=where, fix=fix)
        r, alpha = strength_of(config, path)
        experts = A.shape[0] // r if config.target_parameters else 1
        if experts > 1 and config.rank_pattern:
            what = f"the factors of '{path}' are a stack of experts, and rank_pattern is given: its rank is not known"
            raise AdapterError(what, where=where, fix="use an adapter with one rank for all its layers")
        if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == r * experts:
            what = f"the factors of '{path}' are {list(A.shape)} and {list(B.shape)}: no update of rank {r}"
            raise AdapterError(what, where=where, fix="give r and rank_pattern in adapter_config.json as trained")
        scaling = config.scaling(r, alpha)
        if experts == 1:
            magnitude = next((tensors[m] for end in _MAGNITUDES if (m := f"{KEY_PREFIX}{path}.{end}") in tensors), None)
            found.append(Update(path, kind, A, B, scaling, magnitude))
            continue
        stack = A.view(experts, r, -1), B.view(-1, r, experts).permute(2, 0, 1)
        found += [Update(path, kind, a, b, scaling, expert=index) for index, (a, b) in enumerate(zip(*stack))]
    return found


def strength_of(config: LoraConfig, path: str) -> tuple[int, float]:
    """Rank and alpha of a layer, by the patterns or the defaults."""
    rank_key, alpha_key = pattern_for(config.rank_pattern, path), pattern_for(config.alpha_pattern, path)
    r = config.r if rank_key is None else config.rank_pattern[rank_key]
    return r, config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]


def spectrum(A: Tensor, B: Tensor, scaling: float = 1.0) -> Spectrum:
    """The SVD of ``scaling * B A`` for ``A [r, in]`` and ``B [out, r]``; n is ``min(r, in, out)``."""
    left, core_left = torch.linalg.qr(B.double())
    right, core_right = torch.linalg.qr(A.double().t())
    U, S, Vh = torch.linalg.svd(scaling * core_left @ core_right.t(), full_matrices=False)
    return Spectrum(left @ U, S, right @ Vh.t())


def singular_values(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """``[n]`` float64, falling: of ``scaling * B A``."""
    core = torch.linalg.qr(B.double(), mode="r")[1] @ torch.linalg.qr(A.double().t(), mode="r")[1].t()
    values: Tensor = torch.linalg.svdvals(scaling * core)
    return values


def effective_rank(S: Tensor) -> float:
    """``exp`` of the entropy of the singular values' shares (Roy & Vetterli 2007); 0 of no update at all."""
    total = S.sum()
    if total == 0:
        return 0.0
    share = S[S > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


def directions_for(S: Tensor, energy: float) -> int:
    """The fewest directions that hold the share ``energy`` of the squared singular values; 0 of no update at all."""
    held = S.square().cumsum(0)
    if not len(S) or held[-1] == 0:
        return 0
    return min(len(S), 1 + int((held < energy * held[-1] * (1 - 1e-12)).sum()))


def factors(parts: Spectrum, n: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``A [n, in]`` and ``B [out, n]`` float64 with ``scaling * B A`` the best approximation of rank ``n``.

    Both have the same size: the root of a singular value goes to either side. Each direction's sign is fixed, so that
    the same update gives the same factors. Where there are fewer directions than ``n``, the rest is zero.
    """
    U, S, V = (part[..., :n] for part in parts)
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    root = (S / scaling).sqrt()
    A, B = (V * sign * root).t(), U * sign * root
    if missing := n - len(S):
        A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
    return A.contiguous(), B.contiguous()


def distance(first: Update, second: Update) -> float:
    """The Frobenius norm of the difference of two updates of one weight."""
    A = torch.cat([first.A.double(), second.A.double()])
    B = torch.cat([first.scaling * first.B.double(), -second.scaling * second.B.double()], dim=1)
    return float(singular_values(A, B).norm())


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
    """
    eps = torch.finfo(weight.dtype).eps
    start = weight.t() @ U  # [in, k]
    mass = start.double().square().sum(0)
    steps = min(_LANCZOS_STEPS, *weight.shape)
    basis = start.new_zeros(steps, *start.shape)
    T = start.new_zeros(U.shape[1], steps, steps, dtype=torch.float64)
    exhausted = torch.full_like(mass, steps == min(weight.shape), dtype=torch.bool)
    largest = torch.zeros_like(mass)
    vector = start / start.norm(dim=0).clamp(min=torch.finfo(start.dtype).tiny)
    for step in range(steps):
        basis[step] = vector
        image = weight.t() @ (weight @ vector)
        largest = torch.maximum(largest, image.norm(dim=0).double())
        T[:, step, step] = (vector * image).double().sum(0)
        if step + 1 == steps:
            break
        known = basis[: step + 1]
        for _ in range(2):  # once does not make it orthogonal
            image = image - torch.einsum("jik,jk->ik", known, torch.einsum("jik,ik->jk", known, image))
        size = image.norm(dim=0)
        ended = size.double() <= 100 * eps * largest
        exhausted |= ended
        T[:, step, step + 1] = T[:, step + 1, step] = torch.where(ended, 0.0, size.double())
        vector = image / torch.where(ended, torch.inf, size)
    nodes, vectors = torch.linalg.eigh(T)  # [k, steps], rising
    real = nodes > 100 * eps * nodes[:, -1:]
    at_nodes = torch.where(real, vectors[:, 0].square() / nodes, 0.0)
    # Between two nodes the polynomials at x are (T - x)^-1 e_m, scaled so that the first one is 1.
    parts = torch.arange(1, _BETWEEN + 1, dtype=torch.float64, device=T.device) / (_BETWEEN + 1)
    x = nodes[:, :-1, None] + parts * nodes.diff(dim=1)[..., None]  # [k, steps - 1, between]
    last = vectors[:, -1, None, None] / (nodes[:, None, None] - x[..., None])  # [k, steps - 1, between, steps]
    polynomials = last.square().sum(-1) / (vectors[:, 0, None, None] * last).sum(-1).square()
    open_gaps = (real[:, :-1] & ~exhausted[:, None])[..., None]
    between = torch.where(open_gaps, 1 / (x * polynomials), 0.0).nan_to_num(0.0)
    return (mass * torch.maximum(at_nodes.amax(1), between.flatten(1).amax(1))).clamp(max=1.0).sqrt()
