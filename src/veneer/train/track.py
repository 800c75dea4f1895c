"""Experiment trackers, when asked for: each is imported only then, and says how to get it when it is missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from veneer.errors import UsageError, did_you_mean

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Tracker(Protocol):
    """One tracker's run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of one step."""

    def close(self) -> None:
        """Ends the run, sending what is pending."""


class _TensorBoard:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        writer_module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = writer_module.SummaryWriter(log_dir=str(folder / "tensorboard"))
        self._writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in _flat(settings).items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """W&B's interface, which trackio repeats."""

    def __init__(self, module: str, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._module = _import(module, module)
        extra = {"dir": str(folder)} if module == "wandb" else {}
        self._run = self._module.init(project="veneer", name=name, config=dict(_flat(settings)), **extra)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


class _Mlflow:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = _import("mlflow", "mlflow")
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params({key: str(value)[:500] for key, value in _flat(settings).items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def open_trackers(names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any]) -> list[Tracker]:
    """Starts the trackers that ``train.report_to`` names.

    Args:
        folder: the run folder; TensorBoard and W&B write below it.
        settings: the resolved recipe, recorded as the run's parameters.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    check_trackers(names)
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(_TensorBoard(folder, run_name, settings))
        elif name == "mlflow":
            trackers.append(_Mlflow(folder, run_name, settings))
        else:
            trackers.append(_Wandb(name, folder, run_name, settings))
    return trackers


def check_trackers(names: Sequence[str]) -> None:
    """Raises what :func:`open_trackers` would for a name or a missing package, before anything long has begun."""
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) or f"use some of: {', '.join(TRACKERS)}"
            raise UsageError(f"unknown tracker '{name}'", where="train.report_to", fix=hint)
        _import("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of a metrics line, without its step."""
    return {
        key: float(value)
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{package} is not installed",
            where="train.report_to",
            fix=f"pip install {package}, or take it out of train.report_to",
        ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
