"""transformers' loaders, kept quiet and made strict: what they would warn about is an error here."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from veneer.errors import ModelError

_log = logging.getLogger("veneer.models")

# Said at every load and never about the model at hand; the load report is raised as an error from its own data.
_NOISE = (
    "LOAD REPORT",
    "is deprecated",
    "`torch_dtype`",
    "You are using a model of type",
    "tokenizer you are loading from",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Runs transformers without its progress bars; warnings that are not known noise come out under our logger."""
    library = logging.getLogger("transformers")
    collector = _Collector()
    handlers, level, bars = library.handlers[:], library.level, transformers_logging.is_progress_bar_enabled()
    library.handlers, library.propagate = [collector], False
    library.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        library.handlers = handlers
        library.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
    for message in dict.fromkeys(collector.messages):
        if not any(noise in message for noise in _NOISE):
            _log.warning("%s", message)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def model_family(config: Any) -> Any:
    """transformers' family of classes that a configuration's model is read with.

    A model that reads images too keeps its vision tower: it is read with the class that its files were written by,
    where transformers has one for its language model alone as well.
    """
    kind = type(config)
    whole, causal = (family._model_mapping for family in (AutoModelForImageTextToText, AutoModelForCausalLM))
    if kind not in whole:
        return AutoModelForCausalLM
    written_by = (getattr(config, "architectures", None) or [""])[0]
    if kind in causal and written_by != whole[kind].__name__:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def load_module(folder: Path, config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder, on the CPU: every tensor of the files used, every parameter filled.

    Raises:
        ModelError: a tensor is missing, left over or of another shape, or the file cannot be read.
    """
    with quiet():
        try:
            module, report = model_family(config).from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # so that all of them are in the report, which is raised below
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise ModelError(
                f"transformers cannot load this model: {first_line(error)}",
                where=str(folder),
                fix="check config.json and the weight files against the model's source",
            ) from error
    raise_report(report, folder)
    result: nn.Module = module
    return result


def raise_report(report: Mapping[str, Any], folder: Path) -> None:
    """Raises what transformers' report of a load, or a part of one, says to be amiss.

    Raises:
        ModelError: a tensor is missing, left over or of another shape.
    """
    wrong = [
        f"{name}: {tuple(file)} in the file, {tuple(model)} in the model"
        for name, file, model in report.get("mismatched_keys", ())
    ]
    for problem, names, fix in (
        ("tensors of another shape than config.json says", wrong, "the weights belong to another config.json"),
        (
            "parameters that no tensor fills",
            report.get("missing_keys"),
            "the weight files are not complete; fetch them again",
        ),
        (
            "tensors that the model has no place for",
            report.get("unexpected_keys"),
            "config.json names another architecture",
        ),
        ("tensors that could not be read", report.get("error_msgs"), "the weight files do not fit this architecture"),
    ):
        if names:
            raise ModelError(f"{len(names)} {problem}: {shortlist(names)}", where=str(folder), fix=fix)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Every value of every floating-point tensor is a number.

    Raises:
        ModelError: NaN or infinity, with the names of the tensors that hold one.
    """
    bad = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # one pass, no copy; NaN comes through both
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad.append(name)
    if bad:
        raise ModelError(
            f"NaN or infinity in the weights: {shortlist(bad)}",
            where=where,
            fix="fetch the files again, or load with dtype float32 if the values are too large for this one",
        )


def shortlist(names: Iterable[str], count: int = 4) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - count} more" if len(ordered) > count else ""
    return ", ".join(ordered[:count]) + more


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
