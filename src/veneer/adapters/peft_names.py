"""How an adapter is named in PEFT's file, and which of its modules PEFT does not compute as they are trained here.

A module whose name stands in ``target_modules`` is wrapped by PEFT where it recognises its class. Where the base has
stacked experts, PEFT takes ``gate_proj``, ``up_proj`` and ``down_proj`` for the old names of the experts and puts the
update on their stacks, whatever else bears these names (shared experts, dense layers). Named by their parameter
(``mlp.down_proj.weight`` in ``target_parameters``) they are what they are, under the same keys. A router has no other
name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from veneer.adapters.config import LoraConfig
from veneer.adapters.expert_targets import ends_with, parameter_names
from veneer.adapters.experts import ExpertTarget
from veneer.adapters.fused_experts import stack_names
from veneer.adapters.slots import base_modules
from veneer.adapters.structure import is_read
from veneer.adapters.targets import LoraTarget, Plan, inside, pattern_for, target_matches

T = TypeVar("T", int, float)

# Names of layers that PEFT takes for those of experts (peft.utils.transformers_weight_conversion).
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# Models whose out_proj PEFT refuses, by their model_type (peft.tuners.tuners_utils), as it would bypass a fused kernel.
_REFUSED = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def has_stacks(modules: Mapping[str, nn.Module]) -> bool:
    """Whether the base has experts in stacks, for which PEFT reads the names of layers otherwise."""
    return any(stack_names(module) for module in modules.values())


def named_as_parameters(modules: Mapping[str, nn.Module], config: LoraConfig, plan: Plan) -> list[str]:
    """Paths of the modules of ``plan`` whose weight stands among the file's ``target_parameters``."""
    mistaken = has_stacks(modules) and not config.use_dora  # PEFT has no DoRA on parameters
    return [
        target.path
        for target in plan.lora
        if target.kind == "router"
        or (mistaken and target.kind == "linear" and target.path.rpartition(".")[2] in _EXPERT_NAMES)
    ]


def not_in_peft(root: nn.Module, config: LoraConfig, plan: Plan) -> list[str]:
    """What PEFT will not compute of an adapter's file as it is trained here, and what to do; a line for each reason."""
    modules = base_modules(root)
    mamba = getattr(getattr(root, "config", None), "model_type", None) in _REFUSED
    found: dict[str, list[str]] = {}
    for path in (target.path for target in plan.lora):
        owner, _, last = path.rpartition(".")
        if is_read(modules[owner], last):
            found.setdefault("never asks their update, since the layer around them reads the weight", []).append(last)
        elif mamba and last == "out_proj":
            found.setdefault("refuses the whole adapter for them, by the type of the model", []).append(last)
        elif config.use_dora and has_stacks(modules) and last in _EXPERT_NAMES:
            found.setdefault("takes them for the experts, and with DoRA they have no other name", []).append(last)
    lines = []
    if plan.parameters:
        held = ", ".join(dict.fromkeys(name for _, names in plan.parameters for name in names))
        lines.append(
            f"PEFT will not compute this adapter as it is trained here: it has no place for {held}, which are "
            "parameters and no modules. For other programs merge it (veneer merge)"
        )
    biased = [target.path for target in plan.tokens if getattr(modules[target.path], "bias", None) is not None]
    lines += [
        "PEFT will not compute this adapter as it is trained here: where token rows of "
        f"{path} are trained, it leaves the layer's bias out (up to 0.21.2). For other programs merge it (veneer merge)"
        for path in biased
    ]
    for why, names in found.items():
        some = list(dict.fromkeys(names))
        lines.append(
            f"PEFT will not compute this adapter as it is trained here: it {why} ({', '.join(some)}, {len(names)} "
            f"modules). For other programs merge it (veneer merge), or train with exclude_modules: [{', '.join(some)}]"
        )
    return lines


def compact_targets(root: nn.Module, config: LoraConfig, plan: Plan, parameters: Collection[str] = ()) -> list[str]:
    """The shortest sorted list of names that means the same targets to PEFT, less those that are named as parameters.

    Last names (``q_proj``) where they name exactly the plan's modules, else whole paths.
    """
    paths = {target.path for target in plan.lora} - set(parameters)
    short = sorted({path.rpartition(".")[2] for path in paths})
    others = [path for path in base_modules(root) if path and not inside(path, plan.saved)]
    same = {path for path in others if target_matches(config, short, path)} == paths
    return short if same else sorted(paths)


def stable_patterns(
    config: LoraConfig, plan: Plan, parameters: Collection[str] = ()
) -> tuple[dict[str, int], dict[str, float]]:
    """``rank_pattern`` and ``alpha_pattern`` that decide in a file as the plan has it.

    The first match wins, but a file's keys are sorted (PEFT's too, which may then scale a reloaded adapter otherwise
    than the trained one), and what the file names as a parameter is asked for by the parameter's name. Where that would
    change a decision, every module is named by its whole path.

    Args:
        parameters: paths of the modules whose weight stands among the file's ``target_parameters``.
    """
    both = r"(\.weight)?"  # by the module's name too: who reads the tensors without a model knows no other
    found: list[tuple[str, str, LoraTarget | ExpertTarget]] = [
        (f"{t.path}.weight", re.escape(t.path) + both, t) if t.path in parameters else (t.path, re.escape(t.path), t)
        for t in plan.lora
    ]
    targets = [*found, *((t.name, re.escape(t.name), t) for t in plan.experts)]

    def decided(patterns: Mapping[str, T], name: str, default: T) -> T:
        key = pattern_for(sorted(patterns), name)
        return default if key is None else patterns[key]

    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    if any(decided(ranks, name, config.r) != t.r for name, _, t in targets):
        ranks = {key: t.r for _, key, t in targets if t.r != config.r}
    if any(decided(alphas, name, config.lora_alpha) != t.lora_alpha for name, _, t in targets):
        alphas = {key: t.lora_alpha for _, key, t in targets if t.lora_alpha != config.lora_alpha}
    return ranks, alphas


def compact_parameters(modules: Mapping[str, nn.Module], names: Collection[str]) -> list[str]:
    """The shortest sorted list that means the parameters ``names`` to PEFT: ends of paths, or whole ones."""
    wanted = set(names)
    every = {name for path, module in modules.items() for name in parameter_names(path, module)}
    found: set[str] = set()
    for short in {".".join(name.split(".")[-2:]) for name in wanted}:
        same = {name for name in every if ends_with(name, short)}
        found |= {short} if same <= wanted else same & wanted
    return sorted(found)
