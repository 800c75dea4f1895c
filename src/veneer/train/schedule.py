"""The learning rate over the run: pure functions from a step to a multiplier of the peak rate."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """The steps of linear warm-up: ``warmup_ratio`` of the run, rounded up, at most the whole run."""
    return min(total_steps, math.ceil(warmup_ratio * total_steps))


def multiplier(kind: str, step: int, total_steps: int, warmup: int = 0) -> float:
    """The factor on the peak learning rate for the optimizer step number ``step``.

    The warm-up climbs ``1/(warmup+1), 2/(warmup+1), ...``: a first step at rate zero would change nothing and cost a
    whole batch. After it, cosine and linear fall from 1 towards 0, which they would reach at ``total_steps``.

    Args:
        kind: "cosine" (half a period), "linear" or "constant".
        step: 0-based; steps at or beyond ``total_steps`` get the end's value.
        total_steps: optimizer steps of the whole run.
        warmup: steps of warm-up at the start.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule '{kind}': use one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
