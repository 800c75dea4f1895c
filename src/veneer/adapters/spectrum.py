"""The mathematics of looking at an update: its singular values, and the best update of a smaller rank.

    dW = s B A = U S V^T      QR of B and of A^T, then the SVD of the small core  s R_B R_A^T   (never dW itself)

Cutting the smallest singular values off is the best approximation of that rank (Eckart & Young 1936).
Names: ``r`` rank, ``n`` directions that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapters.config import LoraConfig
from veneer.adapters.dora import KEY as MAGNITUDE
from veneer.adapters.model import KEY_PREFIX
from veneer.adapters.targets import pattern_for
from veneer.errors import AdapterError

# The ends of the keys of two factors, by the kind of layer.
_FACTORS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}


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
        A, B = (tensors.get(f"{KEY_PREFIX}{path}.{end}") for end in _FACTORS[kind])
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
            found.append(Update(path, kind, A, B, scaling, tensors.get(f"{KEY_PREFIX}{path}.{MAGNITUDE}")))
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
