"""``veneer eval``: a model against held-out rows, with its base beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AllowBaseMismatch, Base, BatchSize, Device, Dtype, Json, Model, Quiet
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.data import Rows
    from veneer.run import Run


def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="Held-out rows: a file, a folder or a hub id. Of a run, by default its own.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", "-m", help="Names, with commas or repeated; of a run, by default its recipe's."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.  [default: the run's, or 256]")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")] = None,
    batch_size: BatchSize = 64,
    compare: Annotated[bool, typer.Option("--base-too/--no-base", help="Measure the base beside the adapter.")] = True,
    format: Annotated[str, typer.Option(help="Shape of the rows.")] = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    base: Base = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    output: Annotated[
        Path | None, typer.Option(help="Write all rows and scores as JSON.  [default: into the run]")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on held-out rows: metrics with intervals, adapter against base.

    A classifier's run: accuracy, macro F1 and F1 of each class, against always saying the most frequent one.

    Metrics: exact_match, normalized_match, contains, number_match, regex:PATTERN, json_valid, json_exact, json_fields,
    token_f1, rouge_l, perplexity.
    """
    from veneer.cli.classify import class_document, measure_classes
    from veneer.cli.output import console, print_json, say, short_path, stdout_reserved
    from veneer.cli.progress import Counter
    from veneer.run import is_classifier, is_run, load_classifier, load_model, open_run

    run = open_run(model) if is_run(model) else None
    classes = is_classifier(model)
    names = [] if classes else _metrics(metrics, run)
    with stdout_reserved(json):
        from veneer.evaluate import evaluate as measure
        from veneer.evaluate import resolve_metric, write_report
        from veneer.evaluate.class_table import class_tables

        for name in names:
            resolve_metric(name)  # a slip is told before the data are read and the model is loaded
        rows = _rows(data, "labelled" if classes and format == "auto" and run is None else format, run)
        if not quiet:
            say(rows.description)
        where: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "base": base,
            "allow_base_mismatch": allow_base_mismatch,
        }
        if classes:
            result = measure_classes(
                lambda: load_classifier(model, **where),
                model,
                rows,
                run,
                metrics=metrics,
                max_rows=max_rows,
                batch_size=batch_size,
                progress=Counter(quiet=quiet),
            )
        else:
            result = measure(
                load_model(model, **where),
                rows,
                metrics=names,
                max_new_tokens=max_new_tokens or (run.recipe.eval.max_new_tokens if run else 256),
                max_rows=max_rows,
                batch_size=batch_size,
                compare=compare,
                chat_template=run.recipe.data.chat_template if run else None,
                progress=Counter(quiet=quiet),
            )
            result = dataclasses.replace(result, model=model)
        saved = output or (run.folder.eval_folder / f"{_name(rows, max_rows)}.json" if run else None)
        if saved is not None:
            result.save(saved)
        if run is not None and output is None:
            write_report(run.path)
    if json:
        document = (
            class_document(result, saved) if classes else {**result.to_dict(), "saved": str(saved) if saved else None}
        )
        print_json(document)
        return
    for table in class_tables(result) if classes else [result.table()]:
        console().print(table)
    print(result.verdict())
    if saved is not None:
        print(f"rows: {short_path(saved)}")


def _metrics(given: list[str] | None, run: Run | None) -> list[str]:
    from veneer.recipe import METRICS, REGEX_METRIC

    names: list[str] = []
    for entry in given or []:
        # A pattern may hold commas: it is given by itself.
        names += (
            [entry] if entry.startswith(REGEX_METRIC) else [name.strip() for name in entry.split(",") if name.strip()]
        )
    names = names or (list(run.recipe.eval.metrics) if run else [])
    if not names:
        fix = f"--metrics with any of {', '.join(METRICS)}, regex:PATTERN"
        raise UsageError("no metric is named", where="--metrics", fix=fix)
    return list(dict.fromkeys(names))


def _name(rows: Rows, max_rows: int | None) -> str:
    """Of an evaluation's file: a sample does not overwrite what all rows gave."""
    name = Path(rows.source).stem or "held-out"
    return name if max_rows is None or max_rows >= len(rows) else f"{name}-{max_rows}-rows"


def _rows(data: str | None, format: str, run: Run | None) -> Rows:
    from veneer.data.read import read

    if data is not None:
        options: dict[str, Any] = {"format": format}
        if run is not None and format == "auto":
            options = {"format": run.recipe.data.format, "columns": run.recipe.data.columns}
        return read(data, **options)
    if run is None:
        raise UsageError("no held-out rows are named", where="--data", fix="--data FILE")
    from veneer.run import held_out_rows

    held_out = held_out_rows(run.recipe.data)
    if held_out is None:
        raise UsageError("the run held no rows out (its data.eval is null)", where=str(run.path), fix="--data FILE")
    return held_out
