"""AdamW on a part of a flat buffer, with its two moments in 32 or in 8 bits.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p - lr wd p                  p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Decoupled weight decay is Loshchilov & Hutter 2019, alg. 2; block-wise 8-bit moments are Dettmers et al. 2022, sec. 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from veneer.quant.blockwise import NESTED_BLOCK, dequantize_blockwise, quantize_blockwise
from veneer.train.optimizer_memory import Memory, Part, Stored

BLOCK = NESTED_BLOCK  # elements that share one float32 absmax: 256
FUSED = ("cpu", "cuda", "mps")  # the devices for which torch has AdamW in one kernel


class Update(Protocol):
    """How the moments are stored, and one AdamW update of the elements that a part of them belongs to."""

    stored: ClassVar[Mapping[str, Stored]]
    alignment: ClassVar[int]  # elements: every tensor of the buffer starts at a multiple

    def __call__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        moments: Mapping[str, Tensor],
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """Updates ``parameter [k]`` and ``moments`` (``[k / per]`` each) in place; ``step`` counts from 1."""


@dataclass(frozen=True)
class Update32bit:
    """Both moments in float32: torch's own fused AdamW."""

    beta1: float
    beta2: float
    eps: float
    stored: ClassVar[Mapping[str, Stored]] = {"exp_avg": Stored(torch.float32), "exp_avg_sq": Stored(torch.float32)}
    alignment: ClassVar[int] = 16  # a cache line

    def __call__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        moments: Mapping[str, Tensor],
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """See :class:`Update`."""
        fused = parameter.device.type in FUSED
        # torch adds the one itself.
        steps_before = torch.full((), step - 1, dtype=torch.float32, device=parameter.device if fused else "cpu")
        adamw(
            [parameter],
            [gradient],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [],
            [steps_before],
            fused=fused,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )


@dataclass(frozen=True)
class Update8bit:
    """Both moments in 8 bits: dequantised, updated in float32, quantised again.

    The mean takes the signed dynamic map, the variance, which is never negative, the unsigned one: both reach seven
    decades down, since the elements of one block differ by as much. With ``alignment`` a block never holds elements of
    two tensors, whose gradients may differ by more.

    The codes, the scales and the arithmetic are bitsandbytes', but for :func:`at_least_one`.
    """

    beta1: float
    beta2: float
    eps: float
    stored: ClassVar[Mapping[str, Stored]] = {
        "exp_avg": Stored(torch.uint8),
        "exp_avg_absmax": Stored(torch.float32, BLOCK),
        "exp_avg_sq": Stored(torch.uint8),
        "exp_avg_sq_absmax": Stored(torch.float32, BLOCK),
    }
    alignment: ClassVar[int] = BLOCK

    def __call__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        moments: Mapping[str, Tensor],
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """See :class:`Update`."""
        mean = dequantize_blockwise(moments["exp_avg"], moments["exp_avg_absmax"], signed=True)
        variance = dequantize_blockwise(moments["exp_avg_sq"], moments["exp_avg_sq_absmax"], signed=False)
        mean.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        variance.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        codes, absmax = quantize_blockwise(mean, signed=True)
        moments["exp_avg"].copy_(codes)
        moments["exp_avg_absmax"].copy_(absmax)
        codes, absmax = quantize_blockwise(variance, signed=False)
        moments["exp_avg_sq"].copy_(at_least_one(codes, variance))
        moments["exp_avg_sq_absmax"].copy_(absmax)
        denominator = variance.sqrt_().div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)
        if weight_decay:
            parameter.mul_(1 - learning_rate * weight_decay)
        parameter.addcdiv_(mean, denominator, value=-learning_rate / (1 - self.beta1**step))


def at_least_one(codes: Tensor, variance: Tensor) -> Tensor:
    """The codes ``[k]`` uint8 with none of 0, which stands for zero, where the variance ``[k]`` is positive.

    The variance goes with the square of the gradient: an element whose gradients are 2,500 times smaller than the
    block's largest is below half of the map's smallest value. Rounded to zero it leaves a step of mean / eps, ten
    thousands of learning rates, as soon as a gradient is smaller than the ones before; rounded up, the element is
    trained a little more slowly.
    """
    return torch.maximum(codes, (variance > 0).to(torch.uint8))


class AdamW:
    """AdamW's steps over a flat buffer, part by part, with the moments in any memory.

    Args:
        flat, grad: ``[n]`` float32, the parameters and their gradient; ``flat`` is updated in place.
        parts: the elements that are updated together; each starts at a multiple of the update's alignment.
        update: the moments' format and arithmetic.
        memory: holds the moments.
    """

    def __init__(self, flat: Tensor, grad: Tensor, parts: Sequence[Part], update: Update, memory: Memory) -> None:
        self._flat = flat
        self._grad = grad
        self._parts = parts
        self._update = update
        self._memory = memory
        self._steps = 0

    def step(self, learning_rate: float) -> None:
        """One update of all parts."""
        self._steps += 1
        for part, moments in self._memory.visit(self._parts):
            here = slice(part.start, part.stop)
            rate = learning_rate * part.multiplier
            self._update(self._flat[here], self._grad[here], moments, self._steps, rate, part.weight_decay)

    def state(self) -> dict[str, Tensor]:
        """The moments as they are stored, not a copy, and ``steps [1]``."""
        return {**self._memory.tensors(), "steps": torch.tensor([float(self._steps)])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state` returned."""
        for name, tensor in self._memory.tensors().items():
            tensor.copy_(state[name])
        self._steps = int(state["steps"])
