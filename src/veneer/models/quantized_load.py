"""A model with its weights in codes, quantised one by one while they are read: the 16-bit model is never held.

transformers' own loader names, merges and places the tensors. Ours are the source that it reads them from, and the
quantiser that it hands every weight to (its documented extension point, which takes one tensor at a time).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.errors import ModelError, VeneerError
from veneer.models import quantized_experts
from veneer.models.quantized import Quantized, held_bytes, measure
from veneer.models.quantized_config import OURS
from veneer.models.quantized_memory import check_memory
from veneer.models.quantized_plan import Weight, plan_quantisation
from veneer.models.quantized_read import Heap, Lazy, StoredTensor, stored_tensors, weights_in_codes
from veneer.models.strict import first_line, quiet, raise_report
from veneer.quant import QuantConfig, QuantizedLinear, QuantizedTensor, from_state_dict, quantize

Progress = Callable[[int, int, str], None]  # tensors read before this one, tensors in all, this one's name

_METHOD = OURS  # our name among transformers' quantisers


@dataclass(frozen=True)
class _Stored:
    """A weight that is in codes in the files: what its parts' names begin with, and the parts."""

    prefix: str
    parts: dict[str, StoredTensor]

    def read(self, dtype: torch.dtype) -> QuantizedTensor:
        return from_state_dict({name: part.read() for name, part in self.parts.items()}, self.prefix, dtype)


@dataclass
class _Job:
    """One load: what is in codes already, and what was made so far.

    Attributes:
        config: how to quantise; None: the file's codes are taken as they are.
        chosen: what is to be in codes, by parameter.
        offered: what transformers hands over instead of placing it itself.
        stored: each weight that is in codes in the files, by the name that transformers reads it under.
        wrong: parameters of another shape than the model's: name, shape in the file, shape in the model.
        failed: why the load has to stop.
    """

    config: QuantConfig | None
    dtype: torch.dtype
    device: torch.device
    chosen: dict[str, Weight]
    offered: dict[str, Weight]
    stored: dict[str, _Stored]
    made: dict[str, QuantizedTensor] = field(default_factory=dict)
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    failed: Exception | None = None

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
        if self.config is None:
            return value
        if weight.transposed:
            value = value.transpose(-1, -2)
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


@register_quantization_config(_METHOD)
class _Settings(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """Carries the job through transformers to our quantiser."""

    quant_method = _METHOD

    def __init__(self, job: _Job | None = None, **stored: Any) -> None:
        if job is None:  # transformers was asked to open a folder of ours, with experts in codes
            raise ValueError("these weights are in codes that veneer.load_base opens, and transformers cannot")
        self.job = job

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        return self  # transformers copies its configurations; there is one job

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Takes the weights that the job wants out of transformers' hands."""

    quantization_config: _Settings

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

    def __init__(self, job: _Job) -> None:
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
                self.job.failed = error  # raised here it would be a line in a report; the next read raises it
                return {}
            if plain is not None:
                left[name] = plain
            elif missing_keys is not None:
                missing_keys.discard(name)
        return left


def load_quantized(
    folder: Path,
    files: Sequence[Path],
    config: Any,
    quantization: QuantConfig,
    *,
    in_codes: bool,
    skip: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress | None,
    memory_check: bool,
) -> tuple[nn.Module, Quantized]:
    """The model of a folder on ``device``, frozen, its weights in codes, every tensor of the files used.

    Args:
        folder: with the model's own code and generation settings.
        files: its safetensors files.
        config: its configuration, without a ``quantization_config``.
        quantization: how to store the weights.
        in_codes: they are stored so in the files.
        skip: see :func:`veneer.models.quantized_plan.plan_quantisation`.

    Raises:
        ModelError: a tensor is missing, left over, damaged, not finite or of another shape; memory does not suffice.
        UsageError: an entry of ``skip`` matches nothing.
    """
    with quiet(), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    plan = plan_quantisation(skeleton, skip)
    tensors = stored_tensors(files)
    stored = _stored_weights(tensors, folder) if in_codes else {}
    offered = plan.weights | (plan.known if in_codes else {})
    job = _Job(None if in_codes else quantization, dtype, device, plan.weights, offered, stored)
    if memory_check:
        check_memory(skeleton, plan, quantization, device, str(folder))
    options: dict[str, Any] = {}
    if plan.has_experts:
        quantized_experts.register()
        options["experts_implementation"] = quantized_experts.NAME
    heap = Heap()
    source = _sources(job, tensors, progress, heap)
    module = _load(type(skeleton), skeleton.config, folder, source, job, options)
    if progress is not None:
        progress(len(source), len(source), "")
    _check_shapes(skeleton, module, job, folder)
    for name, weight in job.made.items():
        _replace(module, name, plan.weights[name], weight)
    heap.give_back()
    return module.to(device), measure(module, job.made, plan, skip, held_bytes(skeleton))


def _load(
    model_class: type[Any], config: Any, folder: Path, source: dict[str, Lazy], job: _Job, options: dict[str, Any]
) -> nn.Module:
    """The model with the weights that are not in codes, on the CPU; the job has the others."""
    with quiet():
        try:
            module, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=source,
                dtype=job.dtype,
                quantization_config=_Settings(job),
                ignore_mismatched_sizes=True,  # so that all of them are in the report, which is raised below
                output_loading_info=True,
                **options,
            )
            if (folder / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            problem: BaseException = job.failed or error
            raise ModelError(
                f"transformers cannot load this model: {first_line(problem)}",
                where=str(folder),
                fix="check config.json and the weight files against the model's source",
            ) from problem
    if job.failed is not None:
        raise job.failed
    report["mismatched_keys"] = [*report["mismatched_keys"], *job.wrong]
    raise_report(report, folder)
    module.config.name_or_path = module.name_or_path = str(folder)
    result: nn.Module = module
    return result


def _sources(job: _Job, tensors: dict[str, StoredTensor], progress: Progress | None, heap: Heap) -> dict[str, Lazy]:
    """What transformers reads: every tensor of the files, and an empty one for each weight that is in codes."""
    parts = {name for weight in job.stored.values() for name in weight.parts}
    names = [name for name in tensors if name not in parts] + list(job.stored)
    read: list[str] = []

    def reader(name: str) -> Callable[[], Tensor]:
        def now() -> Tensor:
            if isinstance(job.failed, VeneerError):
                raise job.failed
            if job.failed is not None:
                what = f"the weight before {name} cannot be quantised: {first_line(job.failed)}"
                raise ModelError(what, where=name, fix="free memory on the device, or load it on another") from (
                    job.failed
                )
            if progress is not None:
                progress(len(read), len(names), name)
            read.append(name)
            if name in job.stored:
                return torch.empty(0)
            heap.before(tensors[name].nbytes)
            return tensors[name].read()

        return now

    return {name: Lazy(reader(name)) for name in names}


def _stored_weights(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, _Stored]:
    """The weights that are in codes in the files, by the name that the model has for them."""
    found: dict[str, _Stored] = {}
    for module, parts in weights_in_codes(tensors.values()).items():
        # A linear's codes are its weight; those of a stack of experts stand in the place of a parameter.
        found[module[:-1] if _is_stack(module, parts) else f"{module}weight"] = _Stored(module, parts)
    if not found:
        raise ModelError(
            "config.json says that the weights are quantised, and no tensor of the files is",
            where=str(folder),
            fix="remove quantization_config from config.json, or fetch the model again",
        )
    return found


def _is_stack(module: str, parts: dict[str, StoredTensor]) -> bool:
    meta = next((part for name, part in parts.items() if ".quant_state." in name), None)
    if meta is None:
        return f"{module}weight" in parts and len(parts[f"{module}weight"].shape) == 3
    try:
        return len(json.loads(bytes(meta.read().flatten().tolist()))["shape"]) == 3
    except (ValueError, KeyError, TypeError):
        return False  # damaged: whoever reads the weight says so


def _check_shapes(skeleton: nn.Module, module: nn.Module, job: _Job, folder: Path) -> None:
    """Every tensor has the shape of the model's, and is there: older versions of transformers do not look."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    held = {name: tensor for name, tensor in module.state_dict().items() if name not in job.made}
    wrong = [
        (name, tuple(tensor.shape), expected[name])
        for name, tensor in held.items()
        if tuple(tensor.shape) != expected.get(name)
    ]
    missing = {name for name, tensor in held.items() if tensor.is_meta}
    raise_report({"mismatched_keys": wrong, "missing_keys": missing}, folder)


def _replace(module: nn.Module, name: str, weight: Weight, codes: QuantizedTensor) -> None:
    """Puts a weight in codes where the parameter was."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if weight.kind == "experts":
        delattr(owner, attribute)
        setattr(owner, attribute, quantized_experts.QuantizedStack(codes).eval())
        return
    parent, _, child = path.rpartition(".")
    linear = QuantizedLinear(codes, owner._parameters.get("bias"))
    setattr(module.get_submodule(parent), child, linear.train(owner.training))
