"""Where transformers' loader hands weights over: our quantiser, registered with it, and the job that it works for.

A quantiser is a documented extension point of transformers. While one of its kind quantises, tensors are read one at a
time; each weight that it asks for comes to :meth:`Job.take` as the last step of its way, and never reaches the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.errors import ModelError, VeneerError
from veneer.models.quantized_config import OURS
from veneer.models.quantized_plan import Weight
from veneer.models.quantized_read import StoredTensor
from veneer.models.strict import first_line
from veneer.quant import QuantConfig, QuantizedTensor, from_state_dict, quantize


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is in codes in the files: what its parts' names begin with, and the parts."""

    prefix: str
    parts: dict[str, StoredTensor]

    def read(self, dtype: torch.dtype) -> QuantizedTensor:
        return from_state_dict({name: part.read() for name, part in self.parts.items()}, self.prefix, dtype)


@dataclass
class Job:
    """One load: what is in codes already, and what was made so far.

    Attributes:
        config: how to quantise; None: the file's codes are taken as they are.
        chosen: what is to be in codes, by parameter.
        offered: what transformers hands over instead of placing it itself.
        stored: each weight that is in codes in the files, by the name that transformers reads it under.
        visit: is given each chosen weight ``[out, in]`` as it stands in the file; nothing is made of it then.
        wrong: parameters of another shape than the model's: name, shape in the file, shape in the model.
        failed, failed_at: why the load has to stop, and at which parameter.
    """

    config: QuantConfig | None
    dtype: torch.dtype
    device: torch.device
    chosen: dict[str, Weight]
    offered: dict[str, Weight]
    stored: dict[str, StoredWeight]
    visit: Callable[[str, Tensor], None] | None = None
    made: dict[str, QuantizedTensor] = field(default_factory=dict)
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    failed: Exception | None = None
    failed_at: str = ""

    def raise_failure(self) -> None:
        """Raises what went wrong so far, as an error of ours."""
        if isinstance(self.failed, VeneerError):
            raise self.failed
        if self.failed is not None:
            raise ModelError(
                f"the weight cannot be quantised: {first_line(self.failed)}",
                where=self.failed_at,
                fix="free memory on the device, or load the model on another one",
            ) from self.failed

    def take(self, name: str, value: Tensor, source: str) -> Tensor | None:
        """Puts one weight into codes.

        Args:
            name: of the parameter.
            value: ``[out, in]`` or ``[E, out, in]`` (or transposed, as the model has it); empty where codes are stored.
            source: its name in the file.

        Returns:
            None, or the weight where it stays a plain tensor after all.
        """
        weight = self.offered[name]
        if source in self.stored:
            return self._take_codes(name, weight, source)
        if self.config is None and not value.numel():
            raise ModelError(
                "the weight is in codes in pieces that the model has joined, or joined where the model has pieces",
                where=name,
                fix="quantise the model's 16-bit weights: load_base(..., quantize='nf4')",
            )
        if not self._fits(name, tuple(value.shape), weight.shape):
            return None
        if self.config is None and self.visit is None:
            return value
        if weight.transposed:
            value = value.transpose(-1, -2)
        if self.visit is not None:
            if name in self.chosen:
                self.visit(name, value)
            return None
        self.made[name] = quantize(value.to(self.device), self.config, name, self.dtype)
        return None

    def _take_codes(self, name: str, weight: Weight, source: str) -> Tensor | None:
        codes = self.stored[source].read(self.dtype)
        if not self._fits(name, tuple(codes.shape), weight.stored_shape):
            return None
        if name in self.chosen:
            self.made[name] = codes.to(self.device)
            return None
        plain = codes.dequantize()  # a head, a router: whoever reads it expects numbers
        return plain.transpose(-1, -2).contiguous() if weight.transposed else plain

    def _fits(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        if shape != expected:
            self.wrong.append((name, shape, expected))
        return shape == expected


@register_quantization_config(OURS)
class Settings(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """Carries the job through transformers to our quantiser."""

    quant_method = OURS

    def __init__(self, job: Job | None = None, **stored: Any) -> None:
        if job is None:  # transformers was asked to open a folder of ours, with experts in codes
            raise ValueError("these weights are in codes that veneer.load_base opens, and transformers cannot")
        self.job = job

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return self  # transformers copies its configurations; there is one job

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": OURS}


@register_quantizer(OURS)
class _Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Takes the weights that the job wants out of transformers' hands."""

    quantization_config: Settings

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.quantization_config.job.offered

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self.quantization_config.job)

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        self.remove_quantization_config(model)  # from here on the model is ours, and a plain one to transformers

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Take(ConversionOps):  # type: ignore[misc]  # transformers has no types
    """The last step of a weight on its way into the model: it leaves that way."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        left: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if name not in self.job.offered:  # one of several that a tensor was split into
                left[name] = value
                continue
            try:
                plain = self.job.take(name, value[0] if isinstance(value, list) else value, source_patterns[0])
            except Exception as error:
                # Raised here it would be a line in a report, and the load would go on: the next read raises it.
                self.job.failed, self.job.failed_at = error, name
                return {}
            if plain is not None:
                left[name] = plain
            elif missing_keys is not None:
                missing_keys.discard(name)
        return left
