"""What a base with its weights in codes says of itself: which, how small they are, and what kept its 16 bits."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.models.quantized_plan import UNKNOWN_EXPERTS, QuantPlan
from veneer.quant import QuantConfig, QuantizedTensor
from veneer.quant.stack import QuantizedStack

_log = logging.getLogger("veneer.models")


@dataclass(frozen=True)
class Quantized:
    """What was put into codes, measured.

    Attributes:
        config: how; of the most tensors, where a file mixes several.
        skip: what was asked to keep 16 bits.
        tensors, parameters: how many are in codes.
        code_bytes: codes and scales.
        bytes_before, bytes_after: of all weights in the dtype that the model computes in, and as they lie now.
        kept: the weights that could have been quantised and were not, with the reason.
    """

    config: QuantConfig
    skip: tuple[str, ...]
    tensors: int
    parameters: int
    code_bytes: int
    bytes_before: int
    bytes_after: int
    kept: dict[str, str]

    @property
    def bits_per_parameter(self) -> float:
        """Measured, of what is in codes."""
        return 8 * self.code_bytes / self.parameters

    def record(self) -> dict[str, Any]:
        """What makes these weights the ones that they are, JSON-able: to be written beside what was trained on them."""
        return {**dataclasses.asdict(self.config), "skip": list(self.skip)}

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors in {self.config.scheme}, {self.bits_per_parameter:.3f} bits per parameter: "
            f"{_size(self.bytes_before)} -> {_size(self.bytes_after)}"
        )


def measure(
    module: nn.Module, made: Mapping[str, QuantizedTensor], plan: QuantPlan, skip: Sequence[str], bytes_before: int
) -> Quantized:
    """Counts what a load made; warns of experts that kept their 16 bits."""
    configs = Counter(weight.config for weight in made.values())
    unknown = [name for name, reason in plan.kept.items() if reason == UNKNOWN_EXPERTS]
    if unknown:
        size = sum(module.get_parameter(name).nbytes for name in unknown)
        _log.warning(
            "%d stacks of experts keep their 16 bits (%s): %s are of a form that is not known here",
            len(unknown),
            _size(size),
            ", ".join(sorted({name.rpartition(".")[2] for name in unknown})),
        )
    return Quantized(
        config=configs.most_common(1)[0][0],
        skip=tuple(skip),
        tensors=len(made),
        parameters=sum(weight.numel() for weight in made.values()),
        code_bytes=sum(weight.nbytes for weight in made.values()),
        bytes_before=bytes_before,
        bytes_after=held_bytes(module),
        kept=dict(plan.kept),
    )


def held_bytes(module: nn.Module) -> int:
    """Bytes of all weights, codes, scales and buffers of a model; what is shared counts once."""
    tensors = {id(tensor): tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]}
    stacks = [part.weight.nbytes for part in module.modules() if isinstance(part, QuantizedStack)]
    return sum(tensors.values()) + sum(stacks)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
