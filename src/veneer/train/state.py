"""What a run is made of: its plan, fixed at the start, and its state, all that a checkpoint has to remember."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from veneer.train.guards import Guards


@dataclass(frozen=True)
class Plan:
    """The settings of the loop, as plain values.

    Attributes:
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: the last one of an epoch may have fewer rows.
        rows_per_step: rows of one optimizer step over all processes; at most, where there is a budget of tokens.
        tokens_per_step: that budget, or None.
        learning_rate: peak rate.
        lr_scheduler_type: see :mod:`veneer.train.schedule`.
        warmup_steps: of linear warm-up.
        max_grad_norm: clip to this norm; None does not clip.
        seed: of the order of rows, dropout and noise.
        neftune_noise_alpha: NEFTune's alpha, or None.
        logging_steps: a line of metrics every so many steps, over all of them.
        save_steps, eval_steps: a checkpoint, an evaluation every so many steps.
        save_total_limit: newest checkpoints to keep, beside the best; None keeps all.
        metric_for_best: the key of an evaluation's values that says which checkpoint is best.
        greater_is_better: the direction of that value.
        early_stopping_patience: stop after so many evaluations without gain; None never does.
    """

    total_steps: int
    steps_per_epoch: int
    rows_per_step: int
    tokens_per_step: int | None
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    max_grad_norm: float | None
    seed: int
    neftune_noise_alpha: float | None
    logging_steps: int
    save_steps: int
    eval_steps: int
    save_total_limit: int | None
    metric_for_best: str
    greater_is_better: bool
    early_stopping_patience: int | None

    @property
    def step_size(self) -> str:
        """What an optimizer step takes, in words."""
        tokens = self.tokens_per_step
        return f"{self.rows_per_step} rows" if tokens is None else f"rows of up to {tokens} tokens"


@dataclass
class TrainerState:
    """Where a run stands; JSON-able, so that a checkpoint holds all of it.

    Attributes:
        step: optimizer steps done.
        rows_consumed: rows trained on so far, over all epochs; the sampler's whole position.
        trained_tokens, tokens: counts so far, over all processes.
        best_value, best_step: the best evaluation; step 0 (the base itself) never counts.
        base_value: that same figure of the base, before training.
        evaluations_without_gain: in a row, for early stopping.
        evaluation_due: the evaluation of this step has not been finished.
        early_stopped: patience ran out.
        seconds: of training steps, over all sessions.
        window: sums since the last line of metrics.
        guards: memory of :mod:`veneer.train.guards`.
    """

    step: int = 0
    rows_consumed: int = 0
    trained_tokens: int = 0
    tokens: int = 0
    best_value: float | None = None
    best_step: int | None = None
    base_value: float | None = None
    evaluations_without_gain: int = 0
    evaluation_due: bool = False
    early_stopped: bool = False
    seconds: float = 0.0
    window: dict[str, float] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerState:
        return cls(**(values | {"guards": Guards(**values["guards"])}))

    def is_better(self, value: float, greater_is_better: bool) -> bool:
        """Whether an evaluation beats the best so far; NaN never does."""
        if value != value:
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if greater_is_better else value < self.best_value
