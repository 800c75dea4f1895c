"""A config that says which rank every module has: common ones as ``r``, the others by pattern."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping

from veneer.adapters.config import LoraConfig
from veneer.adapters.targets import LoraTarget, Plan, pattern_for


def said_rank(config: LoraConfig, path: str) -> int:
    """The rank that the config itself gives a module."""
    key = pattern_for(config.rank_pattern, path)
    return config.r if key is None else config.rank_pattern[key]


def with_ranks(config: LoraConfig, plan: Plan, ranks: Mapping[str, int]) -> tuple[LoraConfig, Plan]:
    """The config and plan of the same adapter with other ranks and the scaling that it has.

    Args:
        ranks: the new rank by path; a module that is not in it keeps its own.

    Returns:
        ``config`` and ``plan`` themselves where the config says these ranks already.
    """
    if all(ranks.get(target.path, target.r) == target.r == said_rank(config, target.path) for target in plan.lora):
        return config, plan
    plan = with_plan_ranks(config, plan, ranks)
    targets = plan.lora
    usual_r = Counter(target.r for target in targets).most_common(1)[0][0]
    usual_alpha = Counter(target.lora_alpha for target in targets).most_common(1)[0][0]
    # A file may name a layer by its parameter, and patterns then have to decide for that name.
    end = r"(\.weight)?" if config.target_parameters else ""
    named = [(re.escape(t.path) + end, t) for t in targets] + [(re.escape(t.name), t) for t in plan.experts]
    changed = dataclasses.replace(
        config,
        r=usual_r,
        lora_alpha=usual_alpha,
        rank_pattern={name: t.r for name, t in named if t.r != usual_r},
        alpha_pattern={name: t.lora_alpha for name, t in named if t.lora_alpha != usual_alpha},
        init_lora_weights=True,
        adalora_config=None,
        loftq_config=None,
        eva_config=None,
        lora_ga_config=None,
    )
    return changed, plan


def with_plan_ranks(config: LoraConfig, plan: Plan, ranks: Mapping[str, int], *, keep_scaling: bool = True) -> Plan:
    """The plan with other ranks; ``keep_scaling`` changes each module's ``lora_alpha`` with its rank."""
    targets: list[LoraTarget] = []
    for target in plan.lora:
        r = ranks.get(target.path, target.r)
        ratio = r / target.r if keep_scaling else 1.0
        alpha = target.lora_alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
        targets.append(dataclasses.replace(target, r=r, lora_alpha=alpha))
    return dataclasses.replace(plan, lora=tuple(targets))
