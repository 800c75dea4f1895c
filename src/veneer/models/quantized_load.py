"""A model with its weights in codes, quantised one by one while they are read: the 16-bit model is never held.

transformers' own loader names, merges and places the tensors. Ours are the source that it reads them from, and the
quantiser that it hands every weight to (its documented extension point, which takes one tensor at a time).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from veneer.errors import ModelError
from veneer.models import quantized_experts
from veneer.models.quantized import Quantized, held_bytes, measure
from veneer.models.quantized_intake import Job, Settings, StoredWeight
from veneer.models.quantized_memory import check_memory
from veneer.models.quantized_plan import Weight, plan_quantisation
from veneer.models.quantized_read import Heap, Lazy, StoredTensor, stored_tensors, weights_in_codes
from veneer.models.strict import first_line, model_family, quiet, raise_report
from veneer.quant import QuantConfig, QuantizedLinear, QuantizedTensor
from veneer.quant.stack import QuantizedStack

Progress = Callable[[int, int, str], None]  # tensors read before this one, tensors in all, this one's name


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
        skeleton = model_family(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    plan = plan_quantisation(skeleton, skip)
    tensors = stored_tensors(files)
    stored = _stored_weights(tensors, folder) if in_codes else {}
    offered = plan.weights | (plan.known if in_codes else {})
    job = Job(None if in_codes else quantization, dtype, device, plan.weights, offered, stored)
    if memory_check:
        check_memory(skeleton, plan, quantization, device, str(folder))
    options: dict[str, Any] = {}
    if plan.has_experts:
        quantized_experts.register()
        options["experts_implementation"] = quantized_experts.NAME
    heap = Heap()
    source = sources(job, tensors, progress, heap)
    module = load_plain(type(skeleton), skeleton.config, folder, source, job, options)
    if progress is not None:
        progress(len(source), len(source), "")
    _check_shapes(skeleton, module, job, folder)
    for name, weight in job.made.items():
        _replace(module, name, plan.weights[name], weight)
    heap.give_back()
    return module.to(device), measure(module, job.made, plan, skip, held_bytes(skeleton))


def load_plain(
    model_class: type[Any], config: Any, folder: Path, source: dict[str, Lazy], job: Job, options: dict[str, Any]
) -> nn.Module:
    """The model with the weights that are not in codes, on the CPU; the job has the others."""
    with quiet():
        try:
            module, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=source,
                dtype=job.dtype,
                quantization_config=Settings(job),
                ignore_mismatched_sizes=True,  # so that all of them are in the report, which is raised below
                output_loading_info=True,
                **options,
            )
            if (folder / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            job.raise_failure()
            raise ModelError(
                f"transformers cannot load this model: {first_line(error)}",
                where=str(folder),
                fix="check config.json and the weight files against the model's source",
            ) from error
    job.raise_failure()
    report["mismatched_keys"] = [*report["mismatched_keys"], *job.wrong]
    raise_report(report, folder)
    module.config.name_or_path = module.name_or_path = str(folder)
    result: nn.Module = module
    return result


def sources(job: Job, tensors: dict[str, StoredTensor], progress: Progress | None, heap: Heap) -> dict[str, Lazy]:
    """What transformers reads: every tensor of the files, and an empty one for each weight that is in codes."""
    parts = {name for weight in job.stored.values() for name in weight.parts}
    names = [name for name in tensors if name not in parts] + list(job.stored)
    read: list[str] = []

    def reader(name: str) -> Callable[[], Tensor]:
        def now() -> Tensor:
            job.raise_failure()
            if progress is not None:
                progress(len(read), len(names), name)
            read.append(name)
            if name in job.stored:
                return torch.empty(0)
            heap.before(tensors[name].nbytes)
            return tensors[name].read()

        return now

    return {name: Lazy(reader(name)) for name in names}


def _stored_weights(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredWeight]:
    """The weights that are in codes in the files, by the name that the model has for them."""
    found: dict[str, StoredWeight] = {}
    for module, parts in weights_in_codes(tensors.values()).items():
        # A linear's codes are its weight; those of a stack of experts stand in the place of a parameter.
        found[module[:-1] if _is_stack(module, parts) else f"{module}weight"] = StoredWeight(module, parts)
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


def _check_shapes(skeleton: nn.Module, module: nn.Module, job: Job, folder: Path) -> None:
    """Every tensor has the shape of the model's, and is there: older versions of transformers do not look."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    held = {name: tensor for name, tensor in module.state_dict().items() if name not in job.made}
    wrong = [
        (name, tuple(tensor.shape), expected[name])
        for name, tensor in held.items()
        if tuple(tensor.shape) != expected[name]
    ]
    missing = {name for name, tensor in held.items() if tensor.is_meta}
    raise_report({"mismatched_keys": wrong, "missing_keys": missing}, folder)


def _replace(module: nn.Module, name: str, weight: Weight, codes: QuantizedTensor) -> None:
    """Puts a weight in codes where the parameter was."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if weight.kind == "experts":
        delattr(owner, attribute)
        setattr(owner, attribute, QuantizedStack(codes).eval())
        return
    parent, _, child = path.rpartition(".")
    linear = QuantizedLinear(codes, owner._parameters.get("bias"))
    setattr(module.get_submodule(parent), child, linear.train(owner.training))
