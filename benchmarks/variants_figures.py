"""From the records of ``benchmarks.variants`` to figures: chosen rates, differences with intervals, curves.

A held-out file has two halves: the first one chooses learning rates and is not reported, the second one is.
Intervals hold 95 % of resampled rows, of the mean over the seeds; beside them stands what each seed says by itself.

Names: ``S`` seeds, ``N`` held-out rows, ``T`` steps.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.variants_methods import METHODS, RANKS
from benchmarks.variants_results import Record
from veneer.evaluate.bootstrap import Estimate, PairedEstimate, bootstrap_mean, bootstrap_perplexity

COST = "cost"  # the task of a record of --cost
NO_SHARED_SEED = "no seed was run with both"
BASE = "base"  # the method of a record of the base as it is

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What a method came to on a task.

    Attributes:
        rate: the learning rate with the lowest loss on the rows that choose.
        by_rate: that loss (nats per token) of the first seed, for each rate that was tried.
        records: the runs at that rate, a seed each.
        runs: the runs at every rate.
    """

    method: str
    rate: float
    by_rate: dict[float, float]
    records: list[Record]
    runs: list[Record]

    def at(self, rate: float) -> list[Record]:
        """The runs at a learning rate, by seed."""
        return sorted((r for r in self.runs if r["learning_rate"] == rate), key=lambda record: int(record["seed"]))

    @property
    def at_the_edge(self) -> bool:
        """The best rate is the smallest or the largest of several: a better one may lie outside."""
        return len(self.by_rate) > 1 and self.rate in (min(self.by_rate), max(self.by_rate))


@dataclass(frozen=True)
class Findings:
    """All that a file of results says.

    Attributes:
        tasks: outcomes by task and method.
        runs: of each task all records of one set of settings, those of its last record.
        costs: records of step time and memory against the reference, by method.
        failures: records of runs that failed and did not succeed later.
    """

    tasks: dict[str, dict[str, Outcome]]
    runs: dict[str, list[Record]]
    costs: dict[str, Record]
    failures: list[Record] = field(default_factory=list)

    def base(self, task: str) -> Record | None:
        return next((record for record in self.runs[task] if record["method"] == BASE), None)


@dataclass(frozen=True)
class Difference:
    """A method against its reference on the same rows; ``seeds`` are the differences of the single seeds."""

    value: float
    low: float
    high: float
    seeds: list[float]

    @property
    def sign(self) -> int:
        """-1 or 1 where rows and seeds agree that the difference is not chance; else 0."""
        if self.high < 0 and all(seed < 0 for seed in self.seeds):
            return -1
        return int(self.low > 0 and all(seed > 0 for seed in self.seeds))


def findings(records: Iterable[Record], failures: Iterable[Record] = ()) -> Findings:
    """Sorts the records of a file; of each task those count that share the settings of the last one."""
    costs: dict[str, Record] = {}
    by_task: dict[str, list[Record]] = {}
    for record in records:
        if record["task"] == COST:
            costs[record["method"]] = record
        else:
            by_task.setdefault(record["task"], []).append(record)
    runs = {task: [r for r in found if r["common"] == found[-1]["common"]] for task, found in by_task.items()}
    tasks = {}
    for task, found in runs.items():
        outcomes: dict[str, Outcome] = {}
        for method in METHODS:
            if (outcome := outcome_of(method, found)) is not None:
                outcomes[method] = outcome
        tasks[task] = outcomes
    return Findings(tasks, runs, costs, list(failures))


def outcome_of(method: str, records: Sequence[Record]) -> Outcome | None:
    """The outcome of a method, from the records of one task; None where it has none."""
    rate = chosen_rate(method, records)
    if rate is None:
        return None
    runs = [record for record in records if record["method"] == method]
    outcome = Outcome(method, rate, losses_by_rate(method, records), [], runs)
    return dataclasses.replace(outcome, records=outcome.at(rate)) if outcome.at(rate) else None


def losses_by_rate(method: str, records: Sequence[Record]) -> dict[float, float]:
    """The loss that chooses, by learning rate, of the method's first seed."""
    own = [record for record in records if record["method"] == method]
    first = min((record["seed"] for record in own), default=0)
    return {r["learning_rate"]: choosing_loss(r) for r in sorted(own, key=_rate) if r["seed"] == first}


def chosen_rate(method: str, records: Sequence[Record]) -> float | None:
    """The method's best learning rate, or that of the method whose rate it takes; None where nothing was measured."""
    by_rate = losses_by_rate(METHODS[method].rate_of or method, records)
    return min(by_rate, key=lambda rate: by_rate[rate]) if by_rate else None


def choosing_loss(record: Record) -> float:
    """Nats per token on the half of the held-out rows that chooses."""
    half = len(record["tokens"]) // 2
    return float(sum(record["nll"][:half]) / sum(record["tokens"][:half]))


def _rate(record: Record) -> float:
    return float(record["learning_rate"])


# --- what is measured on the rows that are reported ------------------------------------------------------------------

Measure = Callable[[Sequence[Record], Sequence[Record] | None], PairedEstimate]


def reported(record: Record, key: str) -> Floats:
    """``[N / 2]`` figures of the rows that are reported."""
    return np.asarray(record[key], dtype=np.float64)[len(record[key]) // 2 :]


def perplexity(records: Sequence[Record], against: Sequence[Record] | None = None) -> PairedEstimate:
    """Of the held-out answers; over the seeds the geometric mean."""
    others = None if against is None else _mean(against, lambda record: reported(record, "nll"))
    tokens = reported(records[0], "tokens")
    return bootstrap_perplexity(_mean(records, lambda record: reported(record, "nll")), tokens, others)


def token_accuracy(records: Sequence[Record], against: Sequence[Record] | None = None) -> PairedEstimate:
    """Tokens of an answer that are the model's first choice, in per cent, as a mean over the rows."""
    return _of_means(lambda r: 100 * reported(r, "correct") / reported(r, "tokens"), records, against)


def exact_match(records: Sequence[Record], against: Sequence[Record] | None = None) -> PairedEstimate:
    """Answers that are the reference's text, in per cent."""
    return _of_means(lambda record: 100 * np.asarray(record["exact"], dtype=np.float64), records, against)


def drift(records: Sequence[Record], against: Sequence[Record] | None = None) -> PairedEstimate:
    """KL (nats per token) from the base on its own answers, as a mean over the prompts."""
    return _of_means(lambda record: np.asarray(record["drift"], dtype=np.float64), records, against)


def _of_means(
    score: Callable[[Record], Floats], records: Sequence[Record], against: Sequence[Record] | None
) -> PairedEstimate:
    return bootstrap_mean(_mean(records, score), None if against is None else _mean(against, score))


def _mean(records: Sequence[Record], score: Callable[[Record], Floats]) -> Floats:
    mean: Floats = np.mean([score(record) for record in records], axis=0)
    return mean


def difference(measure: Measure, one: Sequence[Record], other: Sequence[Record]) -> Difference:
    """``one`` minus ``other``, on the seeds that both have.

    Raises:
        ValueError: they share no seed.
    """
    by_seed = [{record["seed"]: record for record in records} for records in (one, other)]
    shared = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not shared:
        raise ValueError(NO_SHARED_SEED)
    mine, theirs = ([records[seed] for seed in shared] for records in by_seed)

    def delta(a: Sequence[Record], b: Sequence[Record]) -> Estimate:
        found = measure(a, b).difference
        assert found is not None
        return found

    whole = delta(mine, theirs)
    single = [delta([a], [b]).value for a, b in zip(mine, theirs, strict=True)]
    return Difference(whole.value, whole.low, whole.high, single)


# --- curves ----------------------------------------------------------------------------------------------------------


def curve(records: Sequence[Record]) -> list[float]:
    """``[T]`` training loss of each step, the mean over the seeds."""
    return [float(loss) for loss in np.mean([record["losses"] for record in records], axis=0)]


def window(steps: int) -> int:
    """Steps that a smoothed loss is a mean over."""
    return max(3, steps // 10)


def trailing(losses: Sequence[float], width: int) -> list[float]:
    """``[T - width + 1]`` the mean of each step's loss and the ``width - 1`` before it."""
    sums = np.cumsum([0.0, *losses])
    return [float(value) for value in (sums[width:] - sums[:-width]) / width]


def speed_up(one: Sequence[Record], other: Sequence[Record]) -> float | None:
    """How many times fewer steps ``one`` needs to the training loss that ``other`` ends with; None if it never does."""
    mine, theirs = curve(one), curve(other)
    width = window(len(theirs))
    goal = trailing(theirs, width)[-1]
    steps = [
        next((step for step, loss in enumerate(trailing(c, width), start=width) if loss <= goal), None)
        for c in (mine, theirs)
    ]
    return None if steps[0] is None or steps[1] is None else steps[1] / steps[0]


def rank_rates(outcomes: dict[str, Outcome]) -> dict[int, dict[float, float]]:
    """The loss that chooses, by rank and learning rate, of those ranks of plain LoRA that were measured."""
    return {rank: outcomes[name].by_rate for name, rank in RANKS.items() if name in outcomes}


def seeds_of(records: Sequence[Record]) -> list[int]:
    return [int(record["seed"]) for record in records]


def median_of(records: Sequence[Record], key: str) -> float:
    """The median of a single figure over the seeds: one run beside other work does not move it."""
    return statistics.median(float(record[key]) for record in records)
