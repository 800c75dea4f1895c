"""Evaluation: metrics, paired intervals, base against adapter in one load, the report. Imports no torch by itself."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Evaluation": "veneer.evaluate.evaluation",
    "MetricResult": "veneer.evaluate.evaluation",
    "RowResult": "veneer.evaluate.evaluation",
    "METRICS": "veneer.evaluate.metrics",
    "Metric": "veneer.evaluate.metrics",
    "resolve_metric": "veneer.evaluate.metrics",
    "score": "veneer.evaluate.metrics",
    "evaluate": "veneer.evaluate.measure",
    "write_report": "veneer.evaluate.report",
}

__all__ = [
    "METRICS",
    "Evaluation",
    "Metric",
    "MetricResult",
    "RowResult",
    "evaluate",
    "resolve_metric",
    "score",
    "write_report",
]

if TYPE_CHECKING:
    from veneer.evaluate.evaluation import Evaluation, MetricResult, RowResult
    from veneer.evaluate.measure import evaluate
    from veneer.evaluate.metrics import METRICS, Metric, resolve_metric, score
    from veneer.evaluate.report import write_report


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'veneer.evaluate' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(types.ModuleType):
    """Importing this package binds ``veneer.evaluate`` to it, so the package has to answer as the function would."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
