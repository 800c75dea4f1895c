"""What ``target_parameters`` names, and which experts of each stack an adapter changes: ``experts``.

``target_parameters`` means what it means in PEFT: names of parameters, whole or their ends after a dot. A stack of
experts is one, the matrix of a router another; that of a linear is read as the linear itself. ``experts`` is which
experts: of the stacks that are named, or without any, of every stack that the base has. ``top-K`` is resolved by
:func:`veneer.adapters.activation.choose_experts`, which counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from veneer.adapters.config import PLAIN_INITS, LoraConfig
from veneer.adapters.experts import ExpertTarget
from veneer.adapters.fused_experts import is_recognised, stack_names, stack_of
from veneer.adapters.structure import kind_of
from veneer.errors import AdapterError, did_you_mean

Experts = str | Sequence[int] | Mapping[str, Sequence[int]]  # what the config's field of that name holds


@dataclass(frozen=True)
class Named:
    """What ``target_parameters`` names, in the order of the model."""

    stacks: tuple[tuple[str, str], ...]  # (path of the module, name of the stack)
    matrices: tuple[str, ...]  # paths of the routers and linears whose weight is named


def top_k(experts: Experts) -> int | None:
    """The K of ``top-K``; None for anything else."""
    match = re.fullmatch(r"top-(\d+)", experts) if isinstance(experts, str) else None
    return int(match[1]) if match else None


def check_top_k(k: int, count: int) -> None:
    """Raises where a layer of ``count`` experts has no ``k`` of them.

    Raises:
        AdapterError: so.
    """
    if not 1 <= k <= count:
        fix = f"give top-1 to top-{count}, or all"
        raise AdapterError(
            f"experts: top-{k} of {count}: a layer has {count} experts", where="LoraConfig.experts", fix=fix
        )


def fused_experts(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The modules of experts that can be adapted, by path, each with the number of its experts."""
    return {
        path: stack_of(module, stack_names(module)[0]).shape[0]
        for path, module in modules.items()
        if stack_names(module) and is_recognised(module)
    }


def resolve_experts(
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    named: Collection[tuple[str, str]],
    allowed: Callable[[str], bool],
    rank_of: Callable[[str], tuple[int, float]],
) -> tuple[ExpertTarget, ...]:
    """The stacks that get factors, in the order of the model.

    Args:
        modules: the base's, by path.
        named: the stacks of :func:`named_parameters`.
        allowed: whether a module's path is left by the config's exclusions; asked where ``experts`` chooses alone.
        rank_of: rank and alpha of a parameter, by its path.

    Raises:
        AdapterError: there are no experts, or not those that are chosen; ``top-K`` was not counted yet; a setting
            cannot act on experts.
    """
    known = fused_experts(modules)
    chosen = list(named)
    if not chosen and config.experts != "none":
        chosen = [(path, stack) for path in known if allowed(path) for stack in stack_names(modules[path])]
        if not chosen:
            raise _no_experts(modules, config)
    if not chosen:
        return ()
    _check_settings(config)
    targets = []
    for path, stack in chosen:
        experts = _experts_of(config.experts, path, known)
        if experts == ():
            continue  # a layer that the choice leaves out
        r, alpha = rank_of(f"{path}.{stack}")
        _, out_features, in_features = stack_of(modules[path], stack).shape
        if r > min(out_features, in_features):
            raise AdapterError(
                f"rank {r} is larger than an expert's matrix, {out_features} x {in_features}",
                where=f"{path}.{stack}",
                fix=f"give r: {min(out_features, in_features)} or less, or rank_pattern for this parameter",
            )
        targets.append(ExpertTarget(path, stack, r, alpha, known[path], experts))
    return tuple(targets)


def parameter_names(path: str, module: nn.Module) -> list[str]:
    """The whole names of the parameters that ``module`` holds itself, also of those that are in codes."""
    held = [name for name, parameter in module._parameters.items() if parameter is not None]
    in_codes = ["weight"] if kind_of(module) == "linear" and "weight" not in held else []
    return [f"{path}.{name}".lstrip(".") for name in dict.fromkeys([*held, *in_codes, *stack_names(module)])]


def named_parameters(
    modules: Mapping[str, nn.Module], entries: Sequence[str], miss: Callable[[AdapterError], None]
) -> Named:
    """What ``target_parameters`` names.

    Args:
        modules: the base's, by path.
        entries: names of parameters, whole or their ends after a dot.
        miss: takes an entry that changes nothing.

    Raises:
        AdapterError: an entry names a parameter that can have no factors.
    """
    where = "LoraConfig.target_parameters"
    known = fused_experts(modules)
    stacks = {f"{path}.{stack}": (path, stack) for path in known for stack in stack_names(modules[path])}
    matrices = {f"{path}.weight": path for path, module in modules.items() if kind_of(module) in ("linear", "router")}
    others = {
        name: path
        for path, module in modules.items()
        for name in parameter_names(path, module)
        if name not in stacks and name not in matrices
    }
    found: set[str] = set()
    for entry in entries:
        matches = {name for name in (*stacks, *matrices) if ends_with(name, entry)}
        wrong = next((name for name in others if ends_with(name, entry)), None)
        if wrong is not None:
            raise _no_factors(entry, wrong, others[wrong], modules[others[wrong]])
        if not matches:
            short = sorted({".".join(name.split(".")[-2:]) for name in (*stacks, *matrices)})
            fix = did_you_mean(entry, [*short, *stacks, *matrices])
            fix = fix or (f"those that can have factors are {', '.join(short)}" if short else "there is none to name")
            miss(AdapterError(f"target parameter '{entry}' matches nothing in the base", where=where, fix=fix))
        found |= matches
    return Named(
        tuple(pair for name, pair in stacks.items() if name in found),
        tuple(path for name, path in matrices.items() if name in found),
    )


def _no_factors(entry: str, name: str, path: str, owner: nn.Module) -> AdapterError:
    """Why the parameter ``name`` of ``owner`` gets no factors, and what to do instead."""
    if stack_names(owner):
        return _unknown_form(path, owner)
    last, kind = path.rpartition(".")[2], type(owner).__name__
    what, fix = "it is no matrix of a linear or a router, nor a stack of experts", f"modules_to_save: [{last}]"
    if kind_of(owner) in ("embedding", "conv1d") and name.endswith(".weight"):
        what, fix = "PEFT lays these factors out in another way than those of the module", f"target_modules: [{last}]"
    return AdapterError(
        f"target parameter '{entry}' is the '{name.rpartition('.')[2]}' of a {kind}: {what}", where=name, fix=fix
    )


def _experts_of(experts: Experts, path: str, known: Mapping[str, int]) -> tuple[int, ...] | None:
    """Which experts of the layer ``path`` get factors: None for all, empty for none."""
    where, count = "LoraConfig.experts", known[path]
    if isinstance(experts, str):
        k = top_k(experts)
        if k is None:
            return None  # "all", or "none" beside target_parameters
        check_top_k(k, count)
        raise AdapterError(
            f"experts: {experts} depends on which experts your data activates, and that was not counted",
            where=where,
            fix="attach with the config that veneer.adapters.activation.choose_experts(module, config, batches) gives",
        )
    if isinstance(experts, Mapping):
        strange = next((name for name in experts if name not in known), None)
        if strange is not None:
            fix = did_you_mean(strange, known) or f"they are {', '.join(known)}"
            raise AdapterError(f"experts: there are no experts at '{strange}'", where=where, fix=fix)
        experts = experts.get(path, ())
    chosen = tuple(sorted(set(experts)))
    if chosen and chosen[-1] >= count:
        fix = f"the experts are 0 to {count - 1}"
        raise AdapterError(f"there is no expert {chosen[-1]} at '{path}'", where=where, fix=fix)
    return None if len(chosen) == count else chosen


def _check_settings(config: LoraConfig) -> None:
    """Raises for what cannot act on the factors of experts."""
    refused = (
        ("lora_dropout", config.lora_dropout, "PEFT's format for experts has none, so the file would not say it"),
        ("use_dora", config.use_dora, "it needs the norm of every row of every expert's weight and update"),
        ("use_lora_fa", config.use_lora_fa, "the factors of experts are trained together"),
        ("adalora_config", config.adalora_config, "a stack has one rank for all of its experts"),
        ("init_lora_weights", config.init_lora_weights not in PLAIN_INITS, "each expert would need a start of its own"),
    )
    for name, value, why in refused:
        if value:
            raise AdapterError(
                f"{name} does not act on experts: {why}",
                where=f"LoraConfig.{name}",
                fix=f"leave {name} as it is by default, or set experts: none",
            )


def _no_experts(modules: Mapping[str, nn.Module], config: LoraConfig) -> AdapterError:
    fused = [(path, module) for path, module in modules.items() if stack_names(module)]
    unknown = next(((path, module) for path, module in fused if not is_recognised(module)), None)
    if unknown is not None:
        return _unknown_form(*unknown)
    what = f"experts: {config.experts}, but "
    what += "exclude_modules or layers_to_transform take all of them" if fused else "the base has no fused experts"
    return AdapterError(what, where="LoraConfig.experts", fix="set experts: none")


def _unknown_form(path: str, module: nn.Module) -> AdapterError:
    return AdapterError(
        f"these experts ({type(module).__name__}) are of a form that is not known here",
        where=path,
        fix="set experts: none: attention and shared experts can be adapted",
    )


def ends_with(name: str, entry: str) -> bool:
    """Whether ``entry`` is the name itself, or its end after a dot."""
    return name == entry or name.endswith(f".{entry}")
