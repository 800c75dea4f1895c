"""Which method to use, from the figures alone: each sentence has its rule and its numbers."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.variants_claims import Outcomes, against_reference, said
from benchmarks.variants_figures import Difference, Findings, Outcome, difference, drift, perplexity
from benchmarks.variants_methods import LENGTHS, METHODS, RANKS, REFERENCE
from benchmarks.variants_results import Record

# Changes of size, of layers or of length, which are no variants of the method.
_NOT_VARIANTS = {*RANKS, *LENGTHS, "lora-qv"}
STILL_FALLING = 0.05  # of the loss, from the rate before the last one to the last


def advice(found: Findings) -> list[str]:
    """The page "which one should I use", a sentence or two for each question."""
    tasks = {task: outcomes for task, outcomes in found.tasks.items() if REFERENCE in outcomes}
    if not tasks:
        return ["Nothing was measured beside LoRA: there is nothing to advise."]
    return [
        *_first_choice(tasks, found.costs),
        *_no_gain(tasks),
        *_rank(tasks),
        *_pair(tasks, "rslora-r64", "At a high rank", "rank stabilisation"),
        *_pair(tasks, "loftq", "Over a base in 4 bits", "LoftQ's start"),
        *_pair(tasks, "lora-qv", "For the same number of parameters", "only q and v", reverse=True),
        *_drift(tasks),
        *_learning_rate(tasks),
        *_memory(tasks, found.costs),
    ]


def signs(tasks: Mapping[str, Outcomes], name: str) -> dict[str, int]:
    """By task: -1 where the method's perplexity is below its reference's, 1 where above, 0 where that may be chance."""
    deltas = {task: against_reference(outcomes, name) for task, outcomes in tasks.items()}
    return {task: delta.sign for task, delta in deltas.items() if delta is not None}


def _variants(tasks: Mapping[str, Outcomes]) -> list[str]:
    """The methods that compete with plain LoRA of rank 16 over the plain base, and were measured on every task."""
    rivals = [name for name, method in METHODS.items() if method.reference == REFERENCE and method.quantize == "none"]
    return [n for n in rivals if n not in _NOT_VARIANTS and len(signs(tasks, n)) == len(tasks)]


def _first_choice(tasks: Mapping[str, Outcomes], costs: Mapping[str, Record]) -> list[str]:
    """What was better on every task, the largest mean gain first; plain LoRA where nothing was."""
    gains = {
        name: sum(_relative(outcomes, name) for outcomes in tasks.values()) / len(tasks)
        for name in _variants(tasks)
        if all(sign < 0 for sign in signs(tasks, name).values())
    }
    if not gains:
        return [
            f"**Start with LoRA.** None of {_named(_variants(tasks)) or 'the variants'} was better than it on "
            f"{_tasks(tasks)} by more than chance."
        ]
    best, *others = sorted(gains, key=lambda name: gains[name])
    sentences = [
        f"**Start with {METHODS[best].label}.** It was better than LoRA on {_tasks(tasks)}: {_figures(tasks, best)}."
        + _cost(costs, best)
    ]
    if others:
        sentences.append(f"Better than LoRA too: {_each(tasks, others)}.")
    return sentences


def _no_gain(tasks: Mapping[str, Outcomes]) -> list[str]:
    """Of the others: better on one task alone, nowhere better and somewhere worse, or no different."""
    mixed: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for name in _variants(tasks):
        found = set(signs(tasks, name).values())
        if found == {-1}:
            continue
        (mixed if -1 in found else worse if 1 in found else same).append(name)
    sentences = []
    if mixed:
        told = _each(tasks, mixed)
        sentences.append(f"**Try on your own data**, for they were better on one task and not on every one: {told}.")
    if same:
        sentences.append(f"**No difference beyond chance** was measured for {_named(same)}.")
    if worse:
        sentences.append(f"**Worse than LoRA** on one task at least, and on none better: {_each(tasks, worse)}.")
    return sentences


def _rank(tasks: Mapping[str, Outcomes]) -> list[str]:
    """The smallest rank that is nowhere worse than the best one by more than chance."""
    names = [name for name in RANKS if all(name in outcomes for outcomes in tasks.values())]
    if len(names) < 2:
        return []

    def enough(name: str) -> bool:
        for outcomes in tasks.values():
            best = min((outcomes[n] for n in names), key=lambda o: perplexity(o.records).value.value)
            if best.method != name and _delta(outcomes[name], best).sign > 0:
                return False
        return True

    least = next((name for name in names if enough(name)), None)
    told = "; ".join(
        f"{task} {', '.join(f'{perplexity(outcomes[n].records).value.value:.3f} at r {RANKS[n]}' for n in names)}"
        for task, outcomes in tasks.items()
    )
    if least is None:
        return [f"**Rank**: it depends on the task (perplexity: {told})."]
    return [f"**Rank**: r {RANKS[least]} is enough; no other rank measured better by more than chance ({told})."]


def _pair(tasks: Mapping[str, Outcomes], name: str, when: str, what: str, reverse: bool = False) -> list[str]:
    """Whether a method is worth it where it competes with something else than LoRA of rank 16."""
    found = signs(tasks, name)
    if not found:
        return []
    told = _figures({task: tasks[task] for task in found}, name)
    good, bad = all(sign < 0 for sign in found.values()), all(sign > 0 for sign in found.values())
    if good or bad:
        verdict = "pays" if good else "costs"
        return [f"**{when}**, {what} {verdict}: {told}."]
    return [f"**{when}**, {what} {'cost' if reverse else 'gained'} nothing certain: {told}."]


def _drift(tasks: Mapping[str, Outcomes]) -> list[str]:
    """The least drift among the methods that are nowhere worse than LoRA."""
    sound = [REFERENCE, *_sound(tasks)]
    means = {n: [drift(outcomes[n].records).value.value for outcomes in tasks.values()] for n in sound}
    least = min(sound, key=lambda name: sum(means[name]))
    if least == REFERENCE:
        return ["**To keep the base's other abilities**, LoRA itself drifted least of all that measured no worse."]
    own, lora = (", ".join(f"{mean:.3f}" for mean in means[name]) for name in (least, REFERENCE))
    return [
        f"**To keep the base's other abilities**, {METHODS[least].label} drifted least of those that measured no worse "
        f"than LoRA: KL {own}, LoRA's {lora}."
    ]


def _learning_rate(tasks: Mapping[str, Outcomes]) -> list[str]:
    """Each method's rate as a multiple of LoRA's: what a change of method asks for."""
    ratios: dict[str, list[float]] = {}
    for name in _variants(tasks):
        ratios[name] = [outcomes[name].rate / outcomes[REFERENCE].rate for outcomes in tasks.values()]
    if not ratios or all(len(o.by_rate) < 2 for outcomes in tasks.values() for o in outcomes.values()):
        return []
    lora = ", ".join(f"{outcomes[REFERENCE].rate:g} on {task}" for task, outcomes in tasks.items())
    other = [
        f"{METHODS[n].label} {' and '.join(f'{ratio:.2g}' for ratio in dict.fromkeys(r))} times that"
        for n, r in ratios.items()
        if any(abs(ratio - 1) > 0.01 for ratio in r)
    ]
    rest = f"; {', '.join(other)}; the others the same" if other else "; the variants' were the same"
    told = [f"**Learning rate**: LoRA's best was {lora}{rest}. Search it again when you change the method."]
    still = _still_falling(tasks)
    if still:
        told.append(
            "**Not searched far enough**: at the largest rate that was tried, the loss still fell for "
            f"{', '.join(still)}, in percent of that at the rate before. A longer search may place them better."
        )
    return told


def _still_falling(tasks: Mapping[str, Outcomes]) -> list[str]:
    """Methods whose best rate was the largest, and by how much the loss fell to it, the steepest first."""
    falls: dict[str, float] = {}
    for outcomes in tasks.values():
        for name in _variants(tasks):
            losses = outcomes[name].by_rate
            if len(losses) > 1 and outcomes[name].rate == max(losses):
                before = losses[sorted(losses)[-2]]
                falls[name] = max(falls.get(name, 0.0), 1 - losses[outcomes[name].rate] / before)
    steep = sorted((name for name in falls if falls[name] >= STILL_FALLING), key=lambda name: -falls[name])
    return [f"{METHODS[name].label} ({falls[name]:.0%})" for name in steep]


def _memory(tasks: Mapping[str, Outcomes], costs: Mapping[str, Record]) -> list[str]:
    """The method that saves the most memory among those that are nowhere worse, where one does."""
    saving = {n: costs[n]["memory_ratio"] for n in _sound(tasks) if n in costs and costs[n]["memory_ratio"] < 0.97}
    if not saving:
        return []
    least = min(saving, key=lambda name: saving[name])
    return [f"**Where memory is short**, {METHODS[least].label} trained with {saving[least]:.2f} times LoRA's."]


def _sound(tasks: Mapping[str, Outcomes]) -> list[str]:
    """The variants that are nowhere worse than LoRA by more than chance."""
    return [name for name in _variants(tasks) if all(sign <= 0 for sign in signs(tasks, name).values())]


def _delta(one: Outcome, other: Outcome) -> Difference:
    return difference(perplexity, one.records, other.records)


def _relative(outcomes: Outcomes, name: str) -> float:
    delta, reference = against_reference(outcomes, name), METHODS[name].reference
    assert delta is not None
    assert reference is not None
    return delta.value / perplexity(outcomes[reference].records).value.value


def _figures(tasks: Mapping[str, Outcomes], name: str) -> str:
    """A method's gains task by task."""
    told = []
    for task, outcomes in tasks.items():
        delta = against_reference(outcomes, name)
        if delta is not None:
            told.append(f"perplexity {said(delta)}, {100 * _relative(outcomes, name):+.1f} %, on {task}")
    return "; ".join(told)


def _each(tasks: Mapping[str, Outcomes], names: list[str]) -> str:
    """Several methods' gains in per cent of the perplexity, in the order of the tasks."""
    return ", ".join(f"{METHODS[name].label} ({_per_cent(tasks, name)})" for name in names)


def _per_cent(tasks: Mapping[str, Outcomes], name: str) -> str:
    return ", ".join(f"{100 * _relative(outcomes, name):+.1f} %" for outcomes in tasks.values())


def _cost(costs: Mapping[str, Record], name: str) -> str:
    if name not in costs:
        return ""
    cost = costs[name]
    return f" A step takes {cost['step_ratio']:.2f} times LoRA's time and {cost['memory_ratio']:.2f} times its memory."


def _named(names: list[str]) -> str:
    return ", ".join(METHODS[name].label for name in names)


def _tasks(tasks: Mapping[str, Outcomes]) -> str:
    return " and ".join(tasks) if len(tasks) < 3 else "all tasks"
