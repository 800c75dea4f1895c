"""What the codes of a base were made from: its weights once more from their files, one at a time, none of them kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.models.quantized_intake import Job
from veneer.models.quantized_load import load_plain, sources
from veneer.models.quantized_plan import plan_quantisation
from veneer.models.quantized_read import Heap, refuse_codes, stored_tensors
from veneer.models.strict import quiet


def each_original(
    module: nn.Module, files: Collection[Path], paths: Collection[str], visit: Callable[[str, Tensor], None]
) -> None:
    """Calls ``visit`` with each of these paths and its weight ``[out, in]`` in the file's dtype, in the files' order.

    The weights go the way of the first load, through transformers' loader and our reader: the same names, the same
    pieces. Of the others none is held.

    Args:
        module: a model that :func:`veneer.models.quantized_load.load_quantized` made, perhaps with adapters on it.
        files: the safetensors files that it was made from.
        paths: of linears.

    Raises:
        ModelError: the files hold codes, or a tensor cannot be read.
    """
    try:
        refuse_codes(files)
    except ModelError as error:
        raise ModelError(
            "the files hold the codes alone, and not the weights that they were made from",
            where=error.where,
            fix="load the model's 16-bit files with quantize='nf4'",
        ) from error
    config: Any = copy.deepcopy(module.config)
    model_class: Any = type(module)
    with quiet(), torch.device("meta"):
        skeleton = model_class(config)
    plan = plan_quantisation(skeleton)
    linears = plan.weights | {name: weight for name, weight in plan.known.items() if name.endswith(".weight")}
    wanted = {f"{path}.weight": path for path in paths}
    dtype, device = next(module.parameters()).dtype, torch.device("cpu")
    job = Job(
        None,
        dtype,
        device,
        chosen={name: weight for name, weight in linears.items() if name in wanted},
        offered=linears,
        stored={},
        visit=lambda name, weight: visit(wanted[name], weight),
    )
    source = sources(job, stored_tensors(files), None, Heap())
    load_plain(model_class, config, Path(module.name_or_path), source, job, {})  # type: ignore[arg-type]  # transformers'
