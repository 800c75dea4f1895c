"""Evaluation: metrics, paired intervals, base against adapter in one load, the report. Imports no torch by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import lazy_names

_WHERE = {
    "Evaluation": "veneer.evaluate.evaluation",
    "MetricResult": "veneer.evaluate.evaluation",
    "RowResult": "veneer.evaluate.evaluation",
    "METRICS": "veneer.evaluate.metrics",
    "Metric": "veneer.evaluate.metrics",
    "resolve_metric": "veneer.evaluate.metrics",
    "score": "veneer.evaluate.metrics",
    "check_rows": "veneer.evaluate.measure",
    "evaluate": "veneer.evaluate.measure",
    "evaluate_classes": "veneer.evaluate.classify",
    "predict": "veneer.evaluate.classify",
    "write_report": "veneer.evaluate.report",
}

__all__ = [
    "METRICS",
    "Evaluation",
    "Metric",
    "MetricResult",
    "RowResult",
    "check_rows",
    "evaluate",
    "evaluate_classes",
    "predict",
    "resolve_metric",
    "score",
    "write_report",
]

if TYPE_CHECKING:
    from veneer.evaluate.classify import evaluate_classes, predict
    from veneer.evaluate.evaluation import Evaluation, MetricResult, RowResult
    from veneer.evaluate.measure import check_rows, evaluate
    from veneer.evaluate.metrics import METRICS, Metric, resolve_metric, score
    from veneer.evaluate.report import write_report

lazy_names(__name__, _WHERE)
