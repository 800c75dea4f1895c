"""What a run watches for: the failures that would otherwise show hours later, or never.

Two of them stop the run (an adapter tensor that gets no gradient, a NaN), two are said as warnings with the remedy (a
loss that does not move, a validation loss that rises). Their memory is JSON, so that a resumed run warns exactly where
the other would have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from veneer.errors import TrainError

GRADIENT_STEPS = 2  # LoRA's B starts at zero, so A has no gradient before the second step
FLAT_STEPS = 50
FLAT_WINDOW = 10
FLAT_SHARE = 0.01  # of the first losses: less improvement than this is called none
_SPARSE = "trainable_tokens"  # rows of an embedding only get a gradient once their token occurs
_ROUTER = re.compile(r"\.(gate|router)\.lora_")  # of a router only where some token's experts are not certain


@dataclass
class Guards:
    """The memory of the checks across steps.

    Attributes:
        without_gradient: names of the adapter tensors that had no non-zero gradient so far; None before the first step.
        losses: the loss of each of the first 50 steps.
        eval_losses: every held-out loss, in order.
    """

    without_gradient: list[str] | None = None
    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)

    def gradients(self, step: int, names: Sequence[str], nonzero: Sequence[bool]) -> str | None:
        """To be called after each of the first two steps' backward.

        Args:
            step: 1-based.
            nonzero: for each name, whether its gradient had a non-zero entry.

        Returns:
            A warning about token rows that have not occurred yet, or about routers that were certain, or None.

        Raises:
            TrainError: after two steps some tensor has had no gradient at all.
        """
        before = set(names if self.without_gradient is None else self.without_gradient)
        self.without_gradient = [name for name, hit in zip(names, nonzero) if name in before and not hit]
        if step < GRADIENT_STEPS or not self.without_gradient:
            return None
        dead = [name for name in self.without_gradient if _SPARSE not in name and not _ROUTER.search(name)]
        routers = [name for name in self.without_gradient if _ROUTER.search(name)]
        if not dead and routers:
            return (
                f"{len(routers)} of the routers' tensors had no gradient in the first two steps ({routers[0]}): every "
                "token's experts were certain; if it stays so, leave the routers out with adapter.exclude_modules"
            )
        if not dead:
            return (
                "none of the tokens in adapter.trainable_token_indices has occurred in the first two steps: "
                "check the ids if they should be common"
            )
        shown = ", ".join(dead[:6]) + (f" and {len(dead) - 6} more" if len(dead) > 6 else "")
        raise TrainError(
            f"{len(dead)} of {len(names)} adapter tensors had no gradient in the first two steps",
            where=shown,
            fix="these layers do not take part in the loss: leave them out with adapter.exclude_modules or "
            "adapter.layers_to_transform, or mend the module's forward",
        )

    def loss(self, step: int, value: float) -> str | None:
        """To be called after every step; returns a warning at step 50 when the loss has not moved."""
        if step > FLAT_STEPS:
            return None
        self.losses.append(value)
        if len(self.losses) < FLAT_STEPS:
            return None
        first, last = fmean(self.losses[:FLAT_WINDOW]), fmean(self.losses[-FLAT_WINDOW:])
        if last < first * (1 - FLAT_SHARE):
            return None
        moved = "risen" if last > first * (1 + FLAT_SHARE) else "not moved"
        remedy = "try train.learning_rate 3e-4 to 5e-4 or a higher adapter.r"
        return (
            f"the training loss has {moved} in {FLAT_STEPS} steps ({first:.3f} -> {last:.3f}): "
            "look at formatted rows and their mask (veneer data show), check the chat template, then "
            + ("lower train.learning_rate" if moved == "risen" else remedy)
        )

    def evaluation(self, value: float, best_step: int | None) -> str | None:
        """To be called after every evaluation; returns a warning when the loss rose for the second time in a row."""
        self.eval_losses.append(value)
        last = self.eval_losses[-3:]
        if len(last) < 3 or not last[0] < last[1] < last[2]:
            return None
        best = f"; the best checkpoint is step {best_step}" if best_step is not None else ""
        return (
            f"the held-out loss rises ({' -> '.join(f'{v:.3f}' for v in last)}){best}: the adapter memorises. "
            "Fewer epochs, adapter.lora_dropout 0.1, a lower rank, or more rows; "
            "check the split for duplicates (veneer data check)"
        )


def not_finite(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    bad_rows: Sequence[str],
    step_rows: Sequence[str],
    bad_tensors: Sequence[str],
    last_checkpoint: Path | None,
) -> TrainError:
    """The error that stops a run before a NaN or an infinity reaches the weights.

    Args:
        step: 1-based, the step that was about to be taken.
        loss, grad_norm: of that step; at least one of them is not finite.
        bad_rows: rows of the micro-batches whose loss is not finite.
        step_rows: all rows of the step, named when only the gradient is not finite.
        bad_tensors: adapter tensors whose gradient is not finite.
        last_checkpoint: where the run can go on from.
    """
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is not finite (norm {grad_norm})"
    rows = list(bad_rows or step_rows)
    named = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    tensors = f"; first bad gradient: {bad_tensors[0]}" if bad_tensors and math.isfinite(loss) else ""
    kept = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    return TrainError(
        f"{what} at step {step}; the step was not taken and {kept}",
        where=f"rows {named}{tensors}",
        fix="look at these rows (veneer data show); lower train.learning_rate or train.max_grad_norm; "
        "use dtype: float32 if the base overflows; then go on with --resume",
    )
