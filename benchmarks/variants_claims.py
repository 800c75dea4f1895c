"""What the literature says of LoRA's variants, held against what was measured. One rule for each claim, in code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.variants_figures import (
    NO_SHARED_SEED,
    Difference,
    Outcome,
    difference,
    drift,
    exact_match,
    perplexity,
    rank_rates,
    speed_up,
    token_accuracy,
)
from benchmarks.variants_methods import LENGTHS, METHODS, RANKS
from benchmarks.variants_results import Record

HELD, NOT_HELD, UNTESTED = "held", "not held here", "not testable here"
FASTER = 1.1  # a speed-up below this is no finding: the smoothed curves are not that exact
SAME_LOSS = 1.01  # two learning rates whose losses differ by less are equally good

Outcomes = Mapping[str, Outcome]
Answer = tuple[str, str]  # verdict, figures


@dataclass(frozen=True)
class Verdict:
    """A claim, a task that it was held against, what was measured, and what follows."""

    claim: str
    task: str
    measured: str
    verdict: str


def verdicts(tasks: Mapping[str, Outcomes]) -> list[Verdict]:
    """Each claim on each task."""
    found = []
    for claim, needed, rule in CLAIMS:
        for task, outcomes in tasks.items():
            missing = [METHODS[name].label for name in needed if name not in outcomes]
            try:
                verdict, measured = (UNTESTED, f"no run of {', '.join(missing)}") if missing else rule(outcomes)
            except ValueError as error:  # runs that cannot be compared
                verdict, measured = UNTESTED, str(error)
            found.append(Verdict(claim, task, measured, verdict))
    return found


def _rslora(outcomes: Outcomes) -> Answer:
    delta = _perplexity(outcomes, "rslora-r64")
    return _held(delta.sign < 0), f"perplexity at r 64 {said(delta)} to LoRA's"


def _pissa(outcomes: Outcomes) -> Answer:
    return _speed(outcomes, "pissa", 2.0)


def _loraplus(outcomes: Outcomes) -> Answer:
    return _speed(outcomes, "lora+", FASTER)


def _speed(outcomes: Outcomes, name: str, least: float) -> Answer:
    """Held where all seeds together are ``least`` times as fast, and each of them faster than LoRA."""
    mine, lora = outcomes[name].records, outcomes["lora"].records
    pairs = [(a, b) for a in mine for b in lora if a["seed"] == b["seed"]]
    if not pairs:
        raise ValueError(NO_SHARED_SEED)
    whole = speed_up([a for a, _ in pairs], [b for _, b in pairs])
    single = [speed_up([a], [b]) for a, b in pairs]
    if whole is None:
        return NOT_HELD, "never reaches the training loss that LoRA ends with"
    seeds = ", ".join("never" if seed is None else f"{seed:.2f}" for seed in single)
    fast = whole >= least and all(seed is not None and seed > 1 for seed in single)
    return _held(fast), f"LoRA's last training loss in {whole:.2f} times fewer steps (by seed: {seeds})"


def _dora(outcomes: Outcomes) -> Answer:
    """By the first measure that decides: exact match, where LoRA leaves room for it, else token accuracy."""
    mine, lora = outcomes["dora"].records, outcomes["lora"].records
    answered = all("exact" in record for record in [*mine, *lora])
    measures = [("exact match", exact_match)] if answered and _has_room(lora) else []
    verdict, parts = UNTESTED, []
    for name, measure in [*measures, ("token accuracy", token_accuracy)]:
        delta = difference(measure, mine, lora)
        parts.append(f"{name} {said(delta, 2)} points")
        if verdict == UNTESTED and (delta.high < 1.0 or (delta.sign > 0 and delta.value >= 1.0)):
            verdict = _held(delta.high >= 1.0)
    return verdict, "; ".join(parts)


def _has_room(records: list[Record]) -> bool:
    rate = exact_match(records).value.value
    return 0.0 < rate <= 99.0


def _adalora(outcomes: Outcomes) -> Answer:
    delta = _perplexity(outcomes, "adalora")
    return _held(delta.sign < 0), f"perplexity {said(delta)} to LoRA's of r 16"


def _all_linear(outcomes: Outcomes) -> Answer:
    delta = _perplexity(outcomes, "lora-qv")
    counts = [outcomes[name].records[0]["trained_parameters"] for name in ("lora-qv", "lora")]
    told = f"perplexity of q and v alone {said(delta)} to all-linear's ({counts[0]:,} and {counts[1]:,} parameters)"
    return _held(delta.sign > 0), told


def _rates(outcomes: Outcomes) -> Answer:
    """Held where one learning rate is as good as the best one at every rank."""
    table = rank_rates(dict(outcomes))
    shared = sorted(set.intersection(*(set(losses) for losses in table.values())))
    best = {rank: min(losses, key=lambda rate: losses[rate]) for rank, losses in table.items()}
    told = "best rates: " + ", ".join(f"{best[rank]:g} at r {rank}" for rank in table)
    if len(shared) < 3:
        return UNTESTED, f"{told}; fewer than three rates were tried at every rank"
    inside = shared[1:-1]
    if not any(rate in inside for rate in best.values()):
        return UNTESTED, f"{told}: all at the edge of those that were tried"
    costs = {
        rate: max(table[rank][rate] / table[rank][best[rank]] for rank in table) for rate in shared
    }  # what it costs to take this rate everywhere
    common = min(costs, key=lambda rate: costs[rate])
    told += f"; with {common:g} at all ranks the loss is at most {100 * (costs[common] - 1):.1f} % up"
    return _held(costs[common] <= SAME_LOSS), told


def _forgets_with(outcomes: Outcomes, names: Iterable[str]) -> Answer:
    """Held where the drift rises from each to the next, and surely from first to last, at LoRA's learning rate."""
    rate = outcomes["lora"].rate
    runs = {name: outcomes[name].at(rate) for name in names}
    seeds = set.intersection(*({record["seed"] for record in records} for records in runs.values()))
    if not seeds:
        return UNTESTED, f"not all of them were run at LoRA's learning rate, {rate:g}"
    shared = [[record for record in records if record["seed"] in seeds] for records in runs.values()]
    means = [drift(records).value.value for records in shared]
    told = ", ".join(f"{METHODS[name].label} {mean:.3f}" for name, mean in zip(runs, means, strict=True))
    rises = all(before < after for before, after in pairwise(means))
    sure = difference(drift, shared[-1], shared[0]).sign > 0
    return _held(rises and sure), f"KL from the base, all at a learning rate of {rate:g}: {told}"


def _forgets_with_rank(outcomes: Outcomes) -> Answer:
    return _forgets_with(outcomes, RANKS)


def _forgets_with_steps(outcomes: Outcomes) -> Answer:
    return _forgets_with(outcomes, LENGTHS)


CLAIMS: tuple[tuple[str, tuple[str, ...], Callable[[Outcomes], Answer]], ...] = (
    ("rsLoRA wins at high rank", ("rslora-r64", "lora-r64"), _rslora),
    ("PiSSA converges 2 to 3 times faster", ("pissa", "lora"), _pissa),
    ("LoRA+ reaches the same loss up to 2 times faster", ("lora+", "lora"), _loraplus),
    ("DoRA adds 1 to 5 points", ("dora", "lora"), _dora),
    ("AdaLoRA beats fixed rank at equal budget", ("adalora", "lora"), _adalora),
    ("all-linear beats q,v at equal parameters", ("lora-qv", "lora"), _all_linear),
    ("the optimal learning rate does not depend on rank", tuple(RANKS), _rates),
    ("forgetting grows with rank", tuple(RANKS), _forgets_with_rank),
    ("forgetting grows with steps", tuple(LENGTHS), _forgets_with_steps),
)


def said(delta: Difference, digits: int = 3) -> str:
    """A difference with its interval."""
    return f"{delta.value:+.{digits}f} ({delta.low:+.{digits}f} to {delta.high:+.{digits}f})"


def against_reference(outcomes: Outcomes, name: str) -> Difference | None:
    """The perplexity of a method less that of its reference; None where they share no run of one seed."""
    reference = METHODS[name].reference
    if reference is None or name not in outcomes or reference not in outcomes:
        return None
    try:
        return difference(perplexity, outcomes[name].records, outcomes[reference].records)
    except ValueError:
        return None


def _perplexity(outcomes: Outcomes, name: str) -> Difference:
    reference = METHODS[name].reference
    assert reference is not None
    return difference(perplexity, outcomes[name].records, outcomes[reference].records)


def _held(holds: bool) -> str:
    return HELD if holds else NOT_HELD
