"""LoRA-FA's part of a step: the gradient of B as a step of the whole update would have it.

With A fixed, ``s dB' A`` comes closest to the gradient of the weight for ``dB' = (1 / s^2) dB (A A^T)^-1``. As in PEFT
the norm that is clipped, and logged, is that of dB itself, and AdamW's moments are those of ``dB'``. PEFT computes the
product in bfloat16, here it is in float32; its AdamW decays the weights after the step, and adds its epsilon (1e-6)
before the correction of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.adapters import LoraAdapter
from veneer.adapters.frozen_a import preconditioner
from veneer.train.step_hook import StepHook


class FrozenAStep(StepHook):
    """Multiplies the gradient of every B.

    Args:
        adapters: the adapter at every linear.
    """

    def __init__(self, adapters: Sequence[LoraAdapter]) -> None:
        self._adapters = adapters
        self._by: list[Tensor] | None = None  # A does not move; but a resumed run loads it after this was made

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """See the module."""
        if self._by is None:
            self._by = [preconditioner(adapter.A, adapter.scaling) for adapter in self._adapters]
        for adapter, by in zip(self._adapters, self._by):
            gradient = adapter.B.grad
            assert gradient is not None
            gradient.copy_(gradient @ by)
