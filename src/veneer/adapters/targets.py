"""Which modules an adapter changes: names and patterns of the config, resolved against a model without touching it.

The matching rules are PEFT's (so that a config means the same in both); the strictness is not: an entry that changes
nothing is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from veneer.adapters.combinations import no_router
from veneer.adapters.config import ALL_LINEAR, LoraConfig
from veneer.adapters.expert_targets import named_parameters, resolve_experts
from veneer.adapters.experts import ExpertTarget
from veneer.adapters.saved_targets import ends_with, held_parameters, owner_of, resolve_saved
from veneer.adapters.saved_targets import inside as inside
from veneer.adapters.slots import SLOTS, base_modules
from veneer.adapters.structure import Kind, LeftOut, has_few_rows, is_product, kind_of, left_out
from veneer.adapters.structure import output_heads as output_heads
from veneer.errors import AdapterError, did_you_mean


@dataclass(frozen=True)
class LoraTarget:
    """One module that gets factors."""

    path: str
    kind: Kind
    r: int
    lora_alpha: float
    tied_to: str | None = None  # an earlier layer with the same weight, whose factors act here too


@dataclass(frozen=True)
class TokenTarget:
    """One embedding or head, some of whose rows are trained."""

    path: str
    token_ids: tuple[int, ...]
    tied_to: str | None = None  # the embedding whose rows this head reads


@dataclass(frozen=True)
class Plan:
    """What an adapter consists of, in the order of the model's modules."""

    lora: tuple[LoraTarget, ...]
    tokens: tuple[TokenTarget, ...]
    saved: tuple[str, ...]
    unmatched: tuple[str, ...]  # entries of the config that change nothing; only where the resolution was not strict
    experts: tuple[ExpertTarget, ...] = ()
    notes: tuple[str, ...] = ()  # what all-linear did otherwise than a reader of the config would think
    parameters: tuple[tuple[str, tuple[str, ...]], ...] = ()  # modules, and which of their own tensors are trained


def resolve(root: nn.Module, config: LoraConfig, *, from_file: bool = False) -> Plan:
    """Finds every module that ``config`` names in ``root``, seeing through adapters that are already there.

    Args:
        from_file: the config comes from an adapter's file: unmatched entries are collected instead of refused (the
            file's tensors say what there is), and ``modules_to_save`` matches bare ends of paths, as in PEFT.

    Raises:
        AdapterError: an entry matches nothing, a module cannot be adapted, or settings exclude each other.
    """
    modules = base_modules(root)
    unmatched: list[str] = []

    def miss(error: AdapterError) -> None:
        if not from_file:
            raise error
        unmatched.append(error.what)

    saved, parameters = resolve_saved(modules, config, from_file, miss)
    tokens = _resolve_tokens(root, modules, config, from_file)
    free = {path: module for path, module in modules.items() if path and not inside(path, saved)}
    named = named_parameters(free, config.target_parameters or (), miss)
    experts = _resolve_experts(free, config, named.stacks)
    lora, notes = _resolve_lora(modules, free, config, named.matrices, [target.name for target in experts], miss)
    if not from_file:  # another program's file may have other factors in each place
        lora = _tied(lora, modules)
    _check_overlaps({target.path for target in lora}, tokens, saved)
    if not (lora or experts or tokens or saved or parameters):
        raise AdapterError("the adapter changes no module", where="LoraConfig", fix="name modules that the base has")
    return Plan(lora, tokens, saved, tuple(unmatched), experts, notes, parameters)


def name_matches(pattern: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or ends of paths."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(ends_with(path, entry) for entry in pattern)


def target_matches(config: LoraConfig, target_modules: str | Sequence[str], path: str) -> bool:
    """Whether ``target_modules`` (no ``all-linear``) names ``path`` under the config's exclusions and layers."""
    if config.exclude_modules and name_matches(config.exclude_modules, path):
        return False
    if not isinstance(target_modules, str) and path in target_modules:
        return True  # a whole path is not filtered by layers_to_transform
    return name_matches(target_modules, path) and _layer_matches(config, path)


def pattern_for(patterns: Iterable[str], path: str) -> str | None:
    """The first key of ``rank_pattern`` or ``alpha_pattern`` that decides for ``path``."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def _layer_index(config: LoraConfig, path: str) -> int | None:
    """The first number of the path (an expert's index comes later), or the one after a name of ``layers_pattern``."""
    if not config.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(match[1]) if match else None
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        if match:
            return int(match[1])
    return None


def _wanted_layers(config: LoraConfig) -> tuple[int, ...]:
    layers = config.layers_to_transform
    return (layers,) if isinstance(layers, int) else tuple(layers or ())


def _layer_matches(config: LoraConfig, path: str) -> bool:
    wanted = _wanted_layers(config)
    return not wanted or _layer_index(config, path) in wanted


def _resolve_experts(
    free: Mapping[str, nn.Module], config: LoraConfig, named: Collection[tuple[str, str]]
) -> tuple[ExpertTarget, ...]:
    def is_free(path: str) -> bool:
        excluded = config.exclude_modules and name_matches(config.exclude_modules, path)
        return not excluded and _layer_matches(config, path)

    return resolve_experts(free, config, named, is_free, lambda name: _rank_of((name,), config))


def _resolve_lora(
    modules: Mapping[str, nn.Module],
    free: Mapping[str, nn.Module],
    config: LoraConfig,
    named: Collection[str],
    experts: list[str],
    miss: Callable[[AdapterError], None],
) -> tuple[tuple[LoraTarget, ...], tuple[str, ...]]:
    """The modules with factors, and what there is to say of them."""
    notes: list[str] = []
    if config.target_modules == ALL_LINEAR:
        chosen, notes = _all_linear(modules, free, config, miss)
    else:
        chosen = [path for path in free if target_matches(config, config.target_modules, path)]
        _report_unmatched_targets(modules, config, chosen, miss)
    if named:
        chosen = [path for path in free if path in {*chosen, *named}]
    for path in chosen:
        _check_adaptable(path, modules)
    names = {path: (f"{path}.weight", path) if path in named else (path,) for path in chosen}
    _report_unmatched_filters(modules, config, [*(name for pair in names.values() for name in pair), *experts], miss)
    targets = [_target(path, modules[path], config, names[path]) for path in chosen]
    return tuple(targets), (*notes, *_cut_ranks(modules, config, targets))


def _all_linear(
    modules: Mapping[str, nn.Module],
    free: Mapping[str, nn.Module],
    config: LoraConfig,
    miss: Callable[[AdapterError], None],
) -> tuple[list[str], list[str]]:
    """The paths that ``all-linear`` chooses, and what there is to say of those that it leaves out."""
    skipped = left_out(modules)
    every = [path for path, module in free.items() if is_product(module) and path not in skipped]
    excluded = config.exclude_modules
    kept = [path for path in every if not (excluded and name_matches(excluded, path))]
    chosen = [path for path in kept if _layer_matches(config, path)]
    if not chosen:
        where, fix = "LoraConfig.target_modules", "name the modules to adapt in target_modules"
        if kept:
            where = "LoraConfig.layers_to_transform"
            there = sorted({i for path in kept if (i := _layer_index(config, path)) is not None})
            fix = f"the layers are {there[0]} to {there[-1]}" if there else "give layers_pattern: the list of layers"
        elif every:
            where, fix = "LoraConfig.exclude_modules", "exclude fewer modules: it takes all that all-linear chooses"
        miss(AdapterError("'all-linear' is left with no linear layer", where=where, fix=fix))
    why = no_router(config)
    routers = [path for path in chosen if why and kind_of(modules[path]) == "router"]
    last = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in routers))
    notes = [f"the routers ({last}) are left as they are: {why}"] if routers else []
    return [path for path in chosen if path not in routers], notes


def _cut_ranks(modules: Mapping[str, nn.Module], config: LoraConfig, targets: Sequence[LoraTarget]) -> list[str]:
    """What there is to say of the layers that cannot have the rank that was asked for."""
    cut: dict[str, str] = {}
    for target in targets:
        module = modules[target.path]
        asked, _ = _rank_of((target.path,), config)
        if target.r < asked and not has_few_rows(target.path, module):
            shape = " x ".join(map(str, module.weight.shape))  # type: ignore[arg-type]  # a matrix
            cut[f"{target.path.rpartition('.')[2]} ({shape})"] = f"rank {target.r}"
    if not cut:
        return []
    layers = ", ".join(f"{layer} gets {rank}" for layer, rank in cut.items())
    return [f"a rank of {config.r} is larger than some matrices, which get all that they can have: {layers}"]


def _rank_of(names: Sequence[str], config: LoraConfig) -> tuple[int, float]:
    """The rank and alpha of a module or a parameter, by the first of its ``names`` that a pattern decides for."""
    rank_key = next((key for name in names if (key := pattern_for(config.rank_pattern, name))), None)
    alpha_key = next((key for name in names if (key := pattern_for(config.alpha_pattern, name))), None)
    r = config.r if rank_key is None else config.rank_pattern[rank_key]
    return r, config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]


def _tied(targets: tuple[LoraTarget, ...], modules: Mapping[str, nn.Module]) -> tuple[LoraTarget, ...]:
    """Layers that share one weight (Zamba repeats whole blocks) share their factors: merged, the weight stays one."""
    first: dict[tuple[object, ...], LoraTarget] = {}
    found = []
    for target in targets:
        # What is in codes is tied to nothing, and has no weight that stays: the next one could have its id.
        weight = modules[target.path]._parameters.get("weight", modules[target.path])
        same = first.setdefault((id(weight), target.kind, target.r, target.lora_alpha), target)
        found.append(target if same is target else replace(target, tied_to=same.path))
    return tuple(found)


def _target(path: str, module: nn.Module, config: LoraConfig, names: Sequence[str]) -> LoraTarget:
    kind = kind_of(module)
    assert kind is not None
    r, alpha = _rank_of(names, config)
    smaller = min(module.weight.shape)  # type: ignore[arg-type]  # kind_of has seen that it is a matrix
    is_named = any(pattern_for(config.rank_pattern, name) for name in names)
    if config.target_modules == ALL_LINEAR and not is_named and r > smaller:
        # A router has a row for each expert, often fewer than r. It gets the rank that it can have, scaled as others;
        # of a layer that is no router, that is said (_cut_ranks).
        alpha, r = alpha * (math.sqrt(smaller / r) if config.use_rslora else smaller / r), smaller
    return LoraTarget(path, kind, r, alpha)


def _report_unmatched_targets(
    modules: Mapping[str, nn.Module], config: LoraConfig, chosen: list[str], miss: Callable[[AdapterError], None]
) -> None:
    where = "LoraConfig.target_modules"
    names = adaptable_names(modules)
    if isinstance(config.target_modules, str):
        if not chosen:
            fix = "a string is a regular expression for the whole path of a module; give a list to name modules"
            if _any_ends_with(modules, config.target_modules):
                fix = f"give a list: ['{config.target_modules}'] (a string is a regular expression for the whole path)"
            miss(AdapterError(f"target_modules '{config.target_modules}' matches no module", where=where, fix=fix))
        return
    for entry in config.target_modules:
        if any(ends_with(path, entry) for path in chosen):
            continue
        if not _any_ends_with(modules, entry) and (owner := owner_of(entry, modules)) is not None:
            what = f"target module '{entry}' is a parameter of {type(modules[owner]).__name__} and no layer"
            whole = f"train its whole module: modules_to_save: [{owner.rpartition('.')[2]}]"
            fix = f"train it in full: modules_to_save: [{entry}]" if held_parameters(entry, modules) else whole
            miss(AdapterError(what, where=where, fix=fix))
        elif not _any_ends_with(modules, entry):
            fix = did_you_mean(entry, names) or f"the layers that can be adapted are {', '.join(names)}"
            miss(AdapterError(f"target module '{entry}' matches nothing in the base", where=where, fix=fix))
        else:
            what = f"target module '{entry}' is left with no module"
            fix = f"exclude_modules, modules_to_save or layers_to_transform take all of them: remove '{entry}' or those"
            miss(AdapterError(what, where=where, fix=fix))


def _report_unmatched_filters(
    modules: Mapping[str, nn.Module], config: LoraConfig, chosen: list[str], miss: Callable[[AdapterError], None]
) -> None:
    excluded = config.exclude_modules
    for entry in [excluded] if isinstance(excluded, str) else excluded or ():
        pattern = entry if isinstance(excluded, str) else [entry]
        if not any(name_matches(pattern, path) for path in modules):
            fix = did_you_mean(entry, adaptable_names(modules)) or "remove it"
            where = "LoraConfig.exclude_modules"
            miss(AdapterError(f"excluded module '{entry}' matches nothing in the base", where=where, fix=fix))
    found = {_layer_index(config, path) for path in chosen}
    for layer in _wanted_layers(config):
        if layer not in found:
            there = sorted({i for p in modules if (i := _layer_index(config, p)) is not None})
            fix = (
                f"the layers are {there[0]} to {there[-1]}"
                if there
                else "give layers_pattern: the name of the list of layers"
            )
            where = "LoraConfig.layers_to_transform"
            miss(AdapterError(f"layer {layer} has no module to adapt", where=where, fix=fix))
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        used = {pattern_for(patterns, path) for path in chosen}
        for key in patterns:
            if key not in used:
                last = [path.rpartition(".")[2] for path in chosen]
                fix = (
                    did_you_mean(key, sorted({*last, *chosen}))
                    or "remove it, or put it before the pattern that wins over it"
                )
                miss(AdapterError(f"{name} '{key}' decides for no adapted module", where=f"LoraConfig.{name}", fix=fix))


def _resolve_tokens(
    root: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, from_file: bool
) -> tuple[TokenTarget, ...]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return ()
    ids_of: dict[str, tuple[int, ...]] = {}
    if isinstance(wanted, Mapping):
        for entry, ids in wanted.items():
            matches = [p for p in modules if p and (p.endswith(entry) if from_file else ends_with(p, entry))]
            if not matches:
                names = [p.rpartition(".")[2] for p, m in modules.items() if kind_of(m) in ("embedding", "linear")]
                fix = did_you_mean(entry, sorted(set(names))) or "name the embedding, or the output head"
                where = "LoraConfig.trainable_token_indices"
                raise AdapterError(f"'{entry}' matches nothing in the base", where=where, fix=fix)
            ids_of.update(dict.fromkeys(matches, tuple(ids)))
    else:
        ids_of[_input_embedding(root, modules)] = tuple(wanted)
    for path, ids in ids_of.items():
        _check_token_ids(path, modules[path], ids)
    targets: dict[str, TokenTarget] = {}
    for path, ids in ids_of.items():
        targets.setdefault(path, TokenTarget(path, ids))
        if isinstance(modules[path], nn.Embedding):
            for head in _tied_heads(path, modules):
                # Other ids for the head were asked for: then it has rows of its own.
                if ids_of.get(head, ids) == ids:
                    targets[head] = TokenTarget(head, ids, tied_to=path)
    return tuple(targets[path] for path in modules if path in targets)


def _tied_heads(embedding: str, modules: Mapping[str, nn.Module]) -> list[str]:
    weight = modules[embedding].weight
    return [path for path, module in modules.items() if isinstance(module, nn.Linear) and module.weight is weight]


def _input_embedding(root: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    getter = getattr(root, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    if isinstance(found, SLOTS):
        found = found.base_layer
    paths = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    named = [path for path in paths if modules[path] is found]
    if len(named or paths) != 1:
        there = f"one of {', '.join(paths)}" if paths else "the base has none"
        raise AdapterError(
            "which embedding do trainable_token_indices mean?",
            where="LoraConfig.trainable_token_indices",
            fix=f"give {{name of the embedding: [ids]}} ({there})",
        )
    return (named or paths)[0]


def _check_token_ids(path: str, module: nn.Module, ids: tuple[int, ...]) -> None:
    where = f"LoraConfig.trainable_token_indices: {path}"
    if kind_of(module) not in ("embedding", "linear"):
        raise AdapterError(
            f"{type(module).__name__} has no rows of tokens", where=where, fix="name an embedding or a head"
        )
    rows = module.weight.shape[0]  # type: ignore[index]  # kind_of has seen that it is a matrix
    if not ids or len(set(ids)) != len(ids):
        raise AdapterError("token ids have to be given, each once", where=where, fix="remove the repeated ids")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rows:
            raise AdapterError(f"there is no token {token!r}", where=where, fix=f"the ids are 0 to {rows - 1}")


def _check_overlaps(lora: set[str], tokens: tuple[TokenTarget, ...], saved: tuple[str, ...]) -> None:
    for target in tokens:
        because = f" (it is tied to {target.tied_to} and has to follow its rows)" if target.tied_to else ""
        if target.path in lora:
            raise AdapterError(
                f"a module can have LoRA factors or trained token rows, not both{because}",
                where=target.path,
                fix="remove it from target_modules, or from trainable_token_indices",
            )
        if inside(target.path, saved):
            raise AdapterError(
                f"a module can be trained whole or by token rows, not both{because}",
                where=target.path,
                fix="remove it from modules_to_save, or from trainable_token_indices",
            )


def _any_ends_with(modules: Mapping[str, nn.Module], entry: str) -> bool:
    return any(ends_with(path, entry) for path in modules)


def adaptable_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The last names of the modules that can be adapted, in order, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if path and kind_of(module)))


def _check_adaptable(path: str, modules: Mapping[str, nn.Module]) -> None:
    module, owner = modules[path], modules.get(path.rpartition(".")[0])
    if kind_of(module) is None:
        raise _not_adaptable(path, modules)
    if isinstance(owner, nn.MultiheadAttention):
        raise AdapterError(
            "nn.MultiheadAttention reads this layer's weight without calling it: an adapter would do nothing",
            where=path,
            fix="leave it out, or exclude it with exclude_modules",
        )


def _not_adaptable(path: str, modules: Mapping[str, nn.Module]) -> AdapterError:
    inner = {p: m for p, m in modules.items() if p.startswith(f"{path}.")}
    beside = {p: m for p, m in modules.items() if p.rpartition(".")[0] == path.rpartition(".")[0]}
    known: LeftOut | None = left_out(modules).get(path)
    what = f"a {type(modules[path]).__name__} cannot be adapted" + (f": it is {known.why}" if known else "")
    if names := adaptable_names(inner):
        fix = f"name its layers: {', '.join(names)}"
    elif names := adaptable_names(beside):
        fix = f"the layers beside it that can be adapted are {', '.join(names)}"
    else:
        fix = "only linear layers, Conv1D and embeddings can be adapted"
    return AdapterError(
        what, where=path, fix=fix + (f"; or train it whole with {known.how}" if known and known.how else "")
    )
