"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from veneer.adapters import AdaptedModel
from veneer.run import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. It stands for its folder wherever a path is taken.

    Attributes:
        path: the run folder.
        model: the model with its best adapter, in eval mode.
        steps: optimizer steps done.
        epochs: passes over the training rows.
        best_step: the step whose adapter was kept; None without held-out rows.
        metrics: ``train_loss`` (the last one), the held-out figures of the kept step (``eval_...``) and those of the
            base before training (``base_eval_...``).
        training: steps, tokens, seconds, tokens per second, peak memory.
        interrupted: a stop was asked for; the run can be resumed.
        early_stopped: patience ran out.
    """

    path: Path
    model: AdaptedModel = field(repr=False)
    steps: int
    epochs: float
    best_step: int | None
    metrics: dict[str, float]
    training: dict[str, float]
    interrupted: bool
    early_stopped: bool

    @property
    def adapter(self) -> Path:
        """The best adapter, in PEFT's format."""
        return RunFolder(self.path).adapter

    @property
    def report(self) -> Path:
        """The page to look at."""
        return RunFolder(self.path).report

    def __fspath__(self) -> str:
        return str(self.path)
