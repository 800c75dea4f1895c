"""What a variant does in a step beside the gradient of the loss: a few hooks, each doing nothing here.

The loop calls them in this order:

    backward -> add_gradient -> mean and clipping -> before_step -> AdamW -> after_step
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class StepHook:
    """Nothing beside the loss: what most adapters need. ``step`` counts from 1."""

    def add_gradient(self, divisor: float) -> dict[str, float]:
        """Adds the gradient of a term of its own to the summed ones, which are divided by ``divisor`` next.

        Returns:
            Figures for this step's line of metrics.
        """
        return {}

    def before_step(self, step: int) -> None:
        """The mean, clipped gradient lies in the optimizer's buffer and may be changed."""

    def after_step(self, step: int) -> None:
        """The parameters have moved and may be changed."""

    def is_final(self, step: int) -> bool:
        """Whether the adapter of this step has the form that the run ends with, and may be kept as its best."""
        return True

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of it."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state` returned."""
