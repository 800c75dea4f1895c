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

from veneer.adapters.config import ALL_LINEAR, LoraConfig
from veneer.adapters.dora import KEY as MAGNITUDE
from veneer.adapters.fused_experts import EXPERT_WEIGHTS
from veneer.adapters.model import KEY_PREFIX
from veneer.adapters.targets import pattern_for, target_matches
from veneer.errors import AdapterError

# The ends of the keys of two factors, by the kind of layer.
_FACTORS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
_NESTED = ".base_layer"  # once for each stack of the same module that lies above; see expert_files
_MATRIX = ".weight"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight, ``scaling * B A``; an embedding's is that of its transposed matrix."""

    path: str  # of the layer in the base; of an expert's, of the stack that it is in: layers.0.mlp.experts.down_proj
    kind: str  # "linear" or "embedding"
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scaling: float
    magnitude: Tensor | None = None  # [out], DoRA's m: the row norms of the adapted weight
    expert: int | None = None  # in a stack of experts, which share their two tensors in the file
    stored: str | None = None  # where it stands in the file, if that is not its path

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
        path = self.stored or self.path
        return f"{KEY_PREFIX}{path}.{down}", f"{KEY_PREFIX}{path}.{up}"


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
    factors = {path: _pair(tensors, path, kind, where) for path, kind in kinds.items()}
    stacks = _stacks(config, {path: len(A) for path, (A, _) in factors.items() if kinds[path] == "linear"})
    counts: dict[str, int] = {}  # of the experts, by module
    found: list[Update] = []
    for path, (A, B) in factors.items():
        names = stacks.get(path, (path,))
        strengths = {strength_of(config, name) for name in names}
        if len(strengths) > 1:
            what = f"the factors of '{path}' are those of one of {', '.join(names)}, and their ranks differ"
            raise AdapterError(what, where=where, fix="use an adapter with one rank for all its stacks of experts")
        r, alpha = strengths.pop()
        count = counts.setdefault(_module_of(path), max(1, len(A) // r)) if path in stacks else 1
        if not len(A) == B.shape[1] == r * count:
            what = f"the factors of '{path}' are {list(A.shape)} and {list(B.shape)}: no update of rank {r}"
            what += f" for each of {count} experts" if path in stacks else ""
            raise AdapterError(what, where=where, fix="give r and rank_pattern in adapter_config.json as trained")
        scaling = config.scaling(r, alpha)
        if path not in stacks:
            magnitude = tensors.get(f"{KEY_PREFIX}{path}.{MAGNITUDE}")
            found.append(Update(path, kinds[path], A, B, scaling, magnitude))
            continue
        own = names[0] if len(names) == 1 else path
        if count == 1 and own.endswith(_MATRIX):  # a router or a linear that is named by its parameter
            layer = own.removesuffix(_MATRIX)
            found.append(Update(layer, "linear", A, B, scaling, None, None, None if layer == path else path))
            continue
        stack = A.view(count, r, -1), B.view(-1, r, count).permute(2, 0, 1)
        found += [Update(own, "linear", a, b, scaling, None, index, path) for index, (a, b) in enumerate(zip(*stack))]
    return found


def _pair(tensors: Mapping[str, Tensor], path: str, kind: str, where: str) -> tuple[Tensor, Tensor]:
    """The two factors at ``path``, both of them matrices."""
    A, B = (tensors.get(f"{KEY_PREFIX}{path}.{end}") for end in _FACTORS[kind])
    if A is None or B is None:
        fix = "copy the file again, or save the adapter again"
        raise AdapterError(f"the layer '{path}' has one factor of two", where=where, fix=fix)
    if A.ndim != 2 or B.ndim != 2:
        what = f"the factors of '{path}' are {list(A.shape)} and {list(B.shape)}: they should be matrices"
        raise AdapterError(what, where=where, fix="factors of convolutions are not available here")
    return A, B


def _stacks(config: LoraConfig, rows: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Which of the places in a file hold stacks of experts, and of which parameter; all that it may be, where unclear.

    Args:
        rows: of A, by place.
    """
    places_of: dict[str, list[str]] = {}
    for place in rows:
        module = _module_of(place)
        if config.target_modules == ALL_LINEAR:  # PEFT and we write names instead: told by the shape
            is_linear = rows[place] == strength_of(config, place)[0]
        else:
            is_linear = target_matches(config, config.target_modules, place)
        if _parameters_of(config, module) and (place != module or not is_linear):
            places_of.setdefault(module, []).append(place)
    found: dict[str, tuple[str, ...]] = {}
    for module, places in places_of.items():
        names = _parameters_of(config, module)
        places.sort(key=len, reverse=True)  # the deepest is that of the parameter that is registered first
        is_known = len(names) == 1 or set(names) <= set(EXPERT_WEIGHTS)
        if len(places) == len(names) and is_known:
            names.sort(key=(*EXPERT_WEIGHTS, *names).index)
            found |= {place: (f"{module}.{name}",) for place, name in zip(places, names)}
        else:
            found |= {place: tuple(f"{module}.{name}" for name in names) for place in places}
    return found


def _module_of(place: str) -> str:
    while place.endswith(_NESTED):
        place = place.removesuffix(_NESTED)
    return place


def _parameters_of(config: LoraConfig, module: str) -> list[str]:
    """The parameters of a module that ``target_parameters`` names; it may not have all of them."""
    split = (entry.rpartition(".") for entry in config.target_parameters or ())
    names = {name for parent, _, name in split if not parent or f".{module}".endswith(f".{parent}")}
    return sorted(names)


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
