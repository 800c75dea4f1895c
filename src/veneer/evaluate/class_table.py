"""A classifier's evaluation as tables for a terminal: figures against the majority class, classes, confusion matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.evaluate.class_scores import MACRO_F1, class_scores, confusion_of
from veneer.evaluate.evaluation import Evaluation, format_difference, format_value

if TYPE_CHECKING:
    from rich.table import Table

MAX_CLASSES = 15  # of a confusion matrix on a terminal; the JSON document and the report hold all


def class_tables(evaluation: Evaluation) -> list[Table]:
    """The figures beside the baseline's; precision, recall and F1 of each class; and who is taken for whom."""
    from rich.table import Table
    from rich.text import Text

    percent = f"{100 * evaluation.confidence:g} % interval"
    majority = evaluation.rows[0].base_prediction
    caption = f"{len(evaluation.rows):,} rows of {evaluation.data_source}; the baseline says '{majority}' of every one"
    figures = Table(caption=caption, caption_justify="left")
    for title in ("metric", "baseline", "classifier", "difference", percent):
        figures.add_column(title, justify="left" if title == "metric" else "right")
    for name, result in evaluation.metrics.items():
        if "." in name or result.difference is None or result.base_value is None:
            continue
        style = {"better": "green", "worse": "red"}.get(result.verdict, "")
        low, high = result.difference_low or 0.0, result.difference_high or 0.0
        figures.add_row(
            "macro F1" if name == MACRO_F1 else name,
            _share(result.base_value),
            f"{_share(result.value)} ({_share(result.low)} to {_share(result.high)})",
            Text(format_difference(name, result.difference), style=style),
            f"{format_difference(name, low)} to {format_difference(name, high)}",
        )
    names, matrix = confusion_of(evaluation)
    classes = Table()
    for title in ("class", "rows", "precision", "recall", "F1", percent):
        classes.add_column(title, justify="left" if title == "class" else "right")
    for score in class_scores(matrix, names):
        result = evaluation.metrics[f"{MACRO_F1}.{score.name}"]
        shares = [_share(value) for value in (score.precision, score.recall, score.f1)]
        classes.add_row(Text(score.name), f"{score.rows:,}", *shares, f"{_share(result.low)} to {_share(result.high)}")
    if len(names) > MAX_CLASSES:
        return [figures, classes]
    crossed = Table()
    crossed.add_column("is, and is taken for")
    for name in names:
        crossed.add_column(Text(name), justify="right")
    for index, name in enumerate(names):
        cells = [
            Text(f"{count:,}" if count else "·", "bold" if index == at else "")
            for at, count in enumerate(matrix[index])
        ]
        crossed.add_row(Text(name), *cells)
    return [figures, classes, crossed]


def _share(value: float | None) -> str:
    return "-" if value is None else format_value(MACRO_F1, value)
