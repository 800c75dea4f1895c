"""AdaLoRA's schedule: how many ranks the adapter has when (Zhang et al. 2023, eq. 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.adapters.settings import AdaLoraConfig
from veneer.errors import TrainError


@dataclass(frozen=True)
class Schedule:
    """How many triplets are kept when; steps count from 1.

    Attributes:
        start, target: triplets of the whole adapter at the beginning and at the end.
        first: the last step with all of them (``tinit``).
        last: the step of the last reallocation (``total - tfinal``).
        every: steps between two reallocations (``deltaT``).
    """

    start: int
    target: int
    first: int
    last: int
    every: int

    def budget(self, step: int) -> int:
        """The paper's cubic course, eq. 12."""
        if step <= self.first:
            return self.start
        left = max(0.0, 1 - (step - self.first) / (self.last - self.first))
        return int(self.target + (self.start - self.target) * left**3)

    def reallocates(self, step: int) -> bool:
        """Whether triplets are chosen anew after this step."""
        return step == self.last or (self.first < step < self.last and step % self.every == 0)


def schedule_of(config: AdaLoraConfig, ranks: Sequence[int], total_steps: int) -> Schedule:
    """The schedule of a run.

    Args:
        ranks: that the modules start with.
        total_steps: of the run.

    Raises:
        TrainError: the run has too few steps for it, or the modules too few ranks.
    """
    where = "adapter.adalora_config"
    if config.total_step not in (None, total_steps):
        raise TrainError(
            f"total_step is {config.total_step}, and this run has {total_steps} steps",
            where=f"{where}.total_step",
            fix="remove it: the run knows its steps",
        )
    start, target = sum(ranks), config.target_r * len(ranks)
    if target > start:
        raise TrainError(
            f"the modules start with {start} ranks together, and target_r {config.target_r} means {target}",
            where=f"{where}.target_r",
            fix="lower it, or raise adapter.r",
        )
    tinit, tfinal = (round(t * total_steps) if t < 1 else int(t) for t in (config.tinit, config.tfinal))
    schedule = Schedule(start, target, tinit, total_steps - tfinal, config.deltaT)
    if not any(schedule.reallocates(step) for step in range(tinit + 1, schedule.last)):
        raise TrainError(
            f"AdaLoRA cannot move ranks in this run: of its {total_steps} steps tinit takes {tinit} and tfinal "
            f"{tfinal}, and no reallocation (one every {config.deltaT} steps) falls between them",
            where=where,
            fix="lower tinit, tfinal or deltaT, or train for more steps",
        )
    return schedule
