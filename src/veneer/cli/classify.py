"""A classifier on the command line: what ``eval`` and ``generate`` do with a run of ``task: classification``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.adapters import AdaptedModel
    from veneer.data import Rows
    from veneer.evaluate import Evaluation
    from veneer.evaluate.classify import Prediction
    from veneer.models import Base
    from veneer.run import Run


def measure_classes(
    load: Callable[[], Base | AdaptedModel],
    model: str,
    rows: Rows,
    run: Run | None,
    *,
    metrics: Sequence[str] | None,
    max_rows: int | None,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> Evaluation:
    """Accuracy and macro F1 of a classifier beside always saying its most frequent class.

    Raises:
        UsageError: a metric of texts was asked for.
    """
    from veneer.cli.output import say
    from veneer.evaluate.classify import evaluate_classes
    from veneer.recipe.schema import CLASS_METRICS
    from veneer.run import classifier_notes

    wrong = [name for entry in metrics or () for name in entry.split(",") if name.strip() not in CLASS_METRICS]
    if wrong:
        fix = f"leave --metrics out: a classifier has {' and '.join(CLASS_METRICS)}"
        raise UsageError(f"'{wrong[0]}' is no metric of a classifier", where="--metrics", fix=fix)
    found = evaluate_classes(
        load(),
        rows,
        majority=classifier_notes(model)["majority"],
        max_length=run.recipe.train.max_length if run else None,
        max_rows=max_rows,
        batch_size=batch_size,
        progress=progress,
        warn=say,
    )
    return dataclasses.replace(found, model=model)


def class_document(found: Evaluation, saved: Path | None) -> dict[str, Any]:
    """The evaluation as ``--json`` prints it, with the confusion matrix and the table of classes."""
    from veneer.evaluate.class_scores import class_scores, confusion_of

    names, matrix = confusion_of(found)
    return {
        **found.to_dict(),
        "classes": [dataclasses.asdict(score) for score in class_scores(matrix, names)],
        "confusion": {"labels": names, "rows_are": "reference", "matrix": matrix.tolist()},
        "saved": str(saved) if saved else None,
    }


def predict_classes(
    load: Callable[[], Base | AdaptedModel],
    model: str,
    texts: Sequence[str],
    data: str | None,
    *,
    max_rows: int | None,
    batch_size: int,
) -> list[Prediction]:
    """The class of each text, or of each row of ``data``.

    Raises:
        UsageError: single texts for a classifier of pairs.
    """
    from veneer.cli.output import say
    from veneer.evaluate.classify import predict
    from veneer.run import classifier_notes, is_run, open_run

    recipe = open_run(model).recipe if is_run(model) else None
    if data is None and classifier_notes(model)["pairs"]:
        fix = "--data FILE with both texts of each row"
        raise UsageError("this classifier was trained on pairs of texts", where="PROMPT", fix=fix)
    rows = texts if data is None else _rows_to_predict(data, dict((recipe and recipe.data.columns) or {}), max_rows)
    max_length = recipe.train.max_length if recipe else None
    return predict(load(), rows, max_length=max_length, batch_size=batch_size, warn=say)


def _rows_to_predict(data: str, columns: dict[str, str], limit: int | None) -> Rows:
    """Rows under the run's columns; the label, which is what is asked for, may be missing in them."""
    from veneer.data.labelled import FORMAT
    from veneer.data.read import read

    try:
        return read(data, format=FORMAT, columns=columns, limit=limit)
    except UsageError:
        if columns.pop("label", None) is None:
            raise
    return read(data, format=FORMAT, columns=columns, limit=limit)


def prediction_document(found: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The predictions as ``--json`` prints them."""
    return [
        {key: value for key, value in dataclasses.asdict(one).items() if key != "reference" or value is not None}
        for one in found
    ]


def print_predictions(found: Sequence[Prediction]) -> None:
    """A label with its probability; with several texts, a line for each with its text behind."""
    if len(found) == 1:
        print(f"{found[0].label}  {found[0].probability:.1%}")
        return
    width = max((len(one.label) for one in found), default=0)
    for one in found:
        text = " ".join(one.text.split())
        print(f"{one.label:<{width}}  {one.probability:6.1%}  {text if len(text) <= 80 else text[:79] + '…'}")
