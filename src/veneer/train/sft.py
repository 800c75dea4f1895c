"""Supervised fine-tuning: the negative log-likelihood of the trained tokens, summed.

An objective is a function ``(module, batch) -> ObjectiveOutput``. It returns sums, never means: the loop divides once
per optimizer step by the trained tokens of all its micro-batches on all processes, which makes the layout of the rows
irrelevant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from veneer.data.pack import Batch
from veneer.models.head import answer_loss, hidden_states


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective says about one micro-batch.

    Attributes:
        loss_sum: scalar float32, differentiable: the sum over the trained tokens.
        trained: how many tokens were summed.
        sums: further figures as sums over the trained tokens; the loop reports each divided by the step's trained
            tokens.
    """

    loss_sum: Tensor
    trained: int
    sums: dict[str, float] = field(default_factory=dict)


Objective = Callable[[nn.Module, Batch], ObjectiveOutput]


def sft(module: nn.Module, batch: Batch) -> ObjectiveOutput:
    """``-sum_t log p(y_t | x_<t)`` over the trained positions.

    Args:
        module: a causal language model.
        batch: a packed or padded micro-batch on the module's device; its targets are shifted already.
    """
    loss = answer_loss(module, hidden_states(module, batch), batch.targets)
    return ObjectiveOutput(loss.loss_sum, loss.trained, {"token_accuracy": loss.correct})
