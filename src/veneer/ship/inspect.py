"""Looking inside an adapter: each layer's spectrum, how it compares with the base, and where in depth the change lives.

Everything is read from the factors. With the base at hand each update is measured against the weight that it changes,
one weight at a time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraEmbedding, LoraLinear, read_adapter
from veneer.adapters.directions import LOOKED_AT, AgainstBase, against_base
from veneer.adapters.dora import KEY as MAGNITUDE
from veneer.adapters.experts import LoraExperts
from veneer.adapters.fused_experts import stack_names, stack_of
from veneer.adapters.save import WEIGHTS
from veneer.adapters.slots import slots
from veneer.adapters.spectrum import (
    Update,
    directions_for,
    effective_rank,
    singular_values,
    updates,
)
from veneer.errors import AdapterError, ModelError, UsageError, VeneerError
from veneer.kernels.matmul import as_tensor
from veneer.run import is_classifier, is_run, load_classifier, load_model, open_run, recorded_base

USED_ENERGY = 0.99  # of the squared singular values: the directions that an update uses
MOST_LAYERS = 0.9  # of the layers have to do with what is advised
ROOM = 1.25  # what is advised beyond what is used

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in layers."""


@dataclass(frozen=True)
class LayerReport:
    """One layer's update ``dW = s B A``."""

    path: str
    kind: str  # the end of the path that tells kinds of modules apart: q_proj; attn.c_proj
    depth: int | None  # the layer's index; None for what is not in a list of layers
    rank: int
    scaling: float
    singular_values: tuple[float, ...]  # falling
    effective_rank: float  # exp of the entropy of the singular values' shares
    rank_90: int  # directions that hold 90 % of the squared singular values
    rank_99: int
    norm: float  # Frobenius
    spectral_norm: float
    share: float  # of the squared norms of all layers
    base: AgainstBase | None = None

    @property
    def relative_norm(self) -> float | None:
        """All that the adapter changes, against the base's weight (Frobenius)."""
        return None if self.base is None else self.base.change_norm / self.base.base_norm

    @property
    def relative_spectral_norm(self) -> float | None:
        """The update's largest singular value against the base's."""
        return None if self.base is None else self.spectral_norm / self.base.base_spectral_norm

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = asdict(self)
        if self.base is not None:
            values["base"] |= {
                "relative_norm": self.relative_norm,
                "relative_spectral_norm": self.relative_spectral_norm,
                "new_directions": self.base.new_directions,
                "directions_looked_at": len(self.base.cosines),
            }
        return values


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_adapter` found.

    Attributes:
        adapter: the folder.
        layers: by path, numbers by their size.
        others: tensors that are no low-rank update (token rows, whole modules), and their numbers.
        base: name of the base that the layers were compared with, or None.
        notes: what is to be known beside the numbers.
    """

    adapter: Path
    layers: list[LayerReport]
    others: dict[str, int] = field(default_factory=dict)
    base: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, list[LayerReport]]:
        """The layers by kind, both in order."""
        found: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            found.setdefault(layer.kind, []).append(layer)
        return found

    @property
    def depth_profile(self) -> dict[int, float]:
        """The share of the squared norm that lies at each layer index, rising."""
        shares: dict[int, float] = {}
        for layer in self.layers:
            if layer.depth is not None:
                shares[layer.depth] = shares.get(layer.depth, 0.0) + layer.share
        return dict(sorted(shares.items()))

    @property
    def used_rank(self) -> int:
        """The rank that holds 99 % of the energy in nine of ten layers."""
        return used_rank(self.layers)

    @property
    def advised_rank(self) -> int | None:
        """A smaller rank to try, or None where what there is is used."""
        return advised_rank(self.layers)

    @property
    def advice(self) -> list[str]:
        """Sentences for people, each by a rule that it states."""
        return advice(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "adapter": str(self.adapter),
            "base": self.base,
            "rank": max(layer.rank for layer in self.layers),
            "used_rank": self.used_rank,
            "advised_rank": self.advised_rank,
            "advice": self.advice,
            "notes": self.notes,
            "depth_profile": self.depth_profile,
            "others": self.others,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def inspect_adapter(
    spec: str | Path,
    *,
    compare: bool | None = None,
    base: str | None = None,
    device: str = "auto",
    directions: int = LOOKED_AT,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Measures each layer's update of an adapter, and its weight's change where the base can be loaded.

    Args:
        spec: a run folder or an adapter folder.
        compare: with the base's weights: True needs the base, False leaves it out, None takes it where it can be loaded
            and says so where not.
        base: the base, where it is not the one recorded.
        device: to compare on.
        directions: how many leading directions of each adapted weight are looked for in the base's; 0: none.
        allow_base_mismatch: compare with a base of other weights.
        progress: is called with each layer that is compared.

    Raises:
        AdapterError: it is no adapter, its tensors hold NaN, it belongs to another base, or it has no low-rank update.
        ModelError: the base cannot be loaded, and was asked for.
        UsageError: the run is not finished, or a number is out of range.
    """
    if directions < 0:
        raise UsageError(f"{directions} directions cannot be looked at", where="directions", fix="give 0 or more")
    folder = adapter_folder(spec)
    config, tensors = read_adapter(folder)
    found = updates(config, tensors, where=str(folder / WEIGHTS))
    if not found:
        fix = "there are no factors to look at: it holds whole modules or token rows alone"
        raise AdapterError("this adapter has no low-rank update", where=str(folder), fix=fix)
    notes: list[str] = []
    adapted = None
    if compare is not False:
        problem = None if is_run(spec) or base is not None else _unnamed_base(folder)
        if problem is None:
            adapted, problem = _load(spec, device=device, base=base, allow_base_mismatch=allow_base_mismatch)
        if problem is not None:
            if compare or base is not None:
                raise problem
            where = f" ({problem.where})" if problem.where else ""
            notes.append(f"not compared with the base: {problem.what}{where}")
    idle = [update for update in found if update.expert is not None and not update.B.any()]
    if idle and len(idle) < len(found):
        # PEFT's file has room for every expert: those that were not chosen are zero.
        notes.append(f"{len(idle)} of {sum(u.expert is not None for u in found)} experts have no update: left out")
        found = [update for update in found if not any(update is other for other in idle)]
    against = _compare(adapted, found, directions, progress) if adapted is not None else {}
    if adapted is not None and len(against) < len(found):
        apart = [update.name for update in found if update.name not in against]
        notes.append(
            f"{len(apart)} of {len(found)} updates have no weight in the base to compare with: {apart[0]}, ..."
        )
    if any(update.magnitude is not None for update in found):
        notes.append("DoRA: the spectra are those of s B A; norms against the base's hold the change of magnitude too")
    factor_keys = {key for update in found for key in update.keys}
    others = {
        key: tensor.numel()
        for key, tensor in tensors.items()
        if key not in factor_keys and not key.endswith(f".{MAGNITUDE}")
    }
    name = adapted.base.identity.name if adapted is not None and adapted.base is not None else None
    layers = sorted(_reports(found, against), key=lambda layer: in_order(layer.path))
    return Inspection(folder, layers, others, name, notes)


def adapter_folder(spec: str | Path) -> Path:
    """The adapter's folder of a run or adapter folder."""
    path = Path(spec).expanduser()
    return open_run(path).folder.adapter if is_run(path) else path


def _unnamed_base(folder: Path) -> VeneerError | None:
    """Why it is not known which base an adapter belongs to."""
    try:
        recorded_base(folder)
    except AdapterError as error:
        return error
    return None


def _load(spec: str | Path, **options: Any) -> tuple[AdaptedModel | None, VeneerError | None]:
    """Base and adapter, or why the base cannot be loaded; an adapter that does not fit it is an error."""
    try:
        loaded = load_classifier(spec, **options) if is_classifier(spec) else load_model(spec, **options)
    except ModelError as error:
        return None, error
    assert isinstance(loaded, AdaptedModel)
    return loaded, None


def _compare(
    adapted: AdaptedModel, found: Sequence[Update], directions: int, progress: Progress | None
) -> dict[str, AgainstBase]:
    """By the update's name, where its layer is a matrix of the base, or its stack one of experts."""
    layers: dict[str, LoraLinear | LoraEmbedding] = {}
    stacks: dict[str, tuple[nn.Module, str]] = {}
    for path, slot in slots(adapted.module):
        if isinstance(slot, LoraLinear | LoraEmbedding):
            layers[path] = slot
        elif isinstance(slot, LoraExperts):
            stacks |= {f"{path}.{name}": (slot.base_layer, name) for name in stack_names(slot.base_layer)}
    results: dict[str, AgainstBase] = {}
    decoded: tuple[str, Tensor] | None = None  # a stack's updates follow one another
    for number, update in enumerate(found, start=1):
        layer, weight = layers.get(update.path), None
        if layer is not None:
            weight = _weight(layer)
        elif update.expert is not None and update.path in stacks:
            if decoded is None or decoded[0] != update.path:
                decoded = update.path, as_tensor(stack_of(*stacks[update.path])).detach()
            weight = decoded[1][update.expert].float()
        if weight is not None:
            # The definition of new directions is one for linears: an embedding's rows are no outputs of a product.
            looked_at = 0 if isinstance(layer, LoraEmbedding) else directions
            results[update.name] = against_base(update, weight, directions=looked_at)
        if progress is not None:
            progress(number, len(found))
    return results


@torch.no_grad()
def _weight(layer: LoraLinear | LoraEmbedding) -> Tensor:
    """``[out, in]`` of the base in float32, decoded where it is in codes."""
    weight = as_tensor(layer.weight).detach()
    turned = isinstance(layer, LoraEmbedding) or layer.transposed
    return (weight.t() if turned else weight).float()


def _reports(found: Sequence[Update], against: dict[str, AgainstBase]) -> list[LayerReport]:
    values = [singular_values(update.A, update.B, update.scaling) for update in found]
    total = sum(float(S.square().sum()) for S in values) or 1.0
    kinds = kinds_of([update.path for update in found])
    return [
        LayerReport(
            path=update.name,
            kind=kinds[update.path],
            depth=depth_of(update.path),
            rank=update.r,
            scaling=update.scaling,
            singular_values=tuple(S.tolist()),
            effective_rank=effective_rank(S),
            rank_90=directions_for(S, 0.9),
            rank_99=directions_for(S, USED_ENERGY),
            norm=float(S.norm()),
            spectral_norm=float(S[0]),
            share=float(S.square().sum()) / total,
            base=against.get(update.name),
        )
        for update, S in zip(found, values)
    ]


def depth_of(path: str) -> int | None:
    """The first number in a path: the layer's index."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match[1]) if match else None


def in_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def kinds_of(paths: Sequence[str]) -> dict[str, str]:
    """By path, the shortest end of it (without numbers) that no other kind of module has: q_proj; attn.c_proj."""
    bare = {path: ".".join(part for part in path.split(".") if not part.isdigit()) or path for path in paths}
    ends: dict[str, str] = {}
    for whole in set(bare.values()):
        parts = whole.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if parts[-count] != "base_layer" and not any(
                other != whole and f".{other}".endswith(f".{end}") for other in set(bare.values())
            ):
                break
        ends[whole] = end
    return {path: ends[whole] for path, whole in bare.items()}


def used_rank(layers: Sequence[LayerReport]) -> int:
    """The rank that holds 99 % of the energy in nine of ten of these layers."""
    needed = sorted(layer.rank_99 for layer in layers)
    return needed[min(len(needed) - 1, int(MOST_LAYERS * len(needed)))]


def advised_rank(layers: Sequence[LayerReport]) -> int | None:
    """A quarter more than is used, up to a multiple of 4 (of 1 below 4); None unless that is less than there is."""
    rank, wanted = max(layer.rank for layer in layers), ROOM * used_rank(layers)
    step = 4 if wanted > 4 else 1
    advised = max(1, step * -int(-wanted // step))
    return advised if advised < rank else None


def advice(found: Inspection) -> list[str]:
    """What follows from the numbers; see :attr:`Inspection.advice`."""
    rank, used = max(layer.rank for layer in found.layers), found.used_rank
    said = []
    idle = [layer.path for layer in found.layers if layer.norm == 0]
    if idle:
        said.append(f"{len(idle)} of {len(found.layers)} layers have no update at all: {', '.join(idle[:3])}")
    if len(idle) == len(found.layers):
        return [*said, "this adapter does nothing: it was not trained, or it was saved before it was"]
    basis = f"{USED_ENERGY:.0%} of the update's energy in {MOST_LAYERS:.0%} of the layers".replace("%", " %")
    if found.advised_rank is not None:
        said.append(
            f"you use {used} of {rank} ranks ({basis}): try r {found.advised_rank}. What it costs on your data: "
            f"{_resize_command(found.adapter, found.advised_rank)}"
        )
    elif used > 0.9 * rank:
        said.append(f"you use {used} of {rank} ranks ({basis}), nearly all: whether a larger r helps, a run can tell")
    else:
        said.append(f"you use {used} of {rank} ranks ({basis}): r {rank} fits")
    looked_at = [layer.base for layer in found.layers if layer.base is not None and layer.base.cosines]
    new, of = sum(b.new_directions for b in looked_at), sum(len(b.cosines) for b in looked_at)
    if new:
        many = sum(b.new_directions > 0 for b in looked_at)
        said.append(
            f"{new} of the {of} leading directions of the adapted weights are new, in {many} of {len(looked_at)} "
            "layers: such directions go with forgetting (Shuttleworth et al. 2024). A lower learning rate or "
            "lora_alpha makes fewer of them; measure what the model forgot"
        )
    elif looked_at:
        said.append(f"none of the {of} leading directions of the adapted weights is new to the base")
    return said


def _resize_command(adapter: Path, rank: int) -> str:
    """As it can be typed; a run has held-out rows of its own."""
    run = adapter.parent if adapter.name == "adapter" and is_run(adapter.parent) else None
    given = run or adapter
    output = shlex.quote(f"{given.name or 'adapter'}-r{rank}")
    data = "" if run else " --data FILE"
    return f"veneer resize {shlex.quote(str(given))} --rank {rank} --output {output}{data}"
