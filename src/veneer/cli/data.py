"""``veneer data check`` and ``veneer data show``: what would be trained on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import Json
from veneer.errors import EXIT_FAILED

if TYPE_CHECKING:
    from veneer.data import Rows
    from veneer.data.classes import Classes

What = Annotated[str, typer.Argument(metavar="RECIPE|RUN|FILE", help="A recipe, a run folder, or a data file.")]
Base = Annotated[str | None, typer.Option(help="The base whose tokenizer and template are used.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of the longest row.")]
Format = Annotated[str | None, typer.Option(help="Shape of the rows.  [default: auto]")]
TrainOn = Annotated[str | None, typer.Option(help="all, last or prompt-too.  [default: all]")]


def check(
    what: What,
    eval_data: Annotated[str | None, typer.Option("--eval", help="Held-out rows to compare with.")] = None,
    base: Base = None,
    max_length: MaxLength = None,
    format: Format = None,
    train_on: TrainOn = None,
    json: Json = False,
) -> None:
    """Check rows before they are trained on: shapes, roles, lengths, duplicates, overlap. Exit code 1 on errors."""
    from veneer.cli.output import print_json, stdout_reserved
    from veneer.cli.rows import open_source, rows_of

    with stdout_reserved(json):
        from veneer.data.check import check as check_rows

        source = open_source(
            what, base=base, max_length=max_length, eval_data=eval_data, format=format, train_on=train_on
        )
        rows, held_out = rows_of(source.data)
        # Labelled rows are no conversations to render: their classes are counted instead.
        is_labelled = source.data.format == "labelled"
        tokenizer = _tokenizer(source.base, source.revision) if source.base and not is_labelled else None
        report = check_rows(
            rows,
            tokenizer,
            max_length=source.max_length,
            eval_rows=held_out,
            train_on=source.data.train_on,
            chat_template=source.data.chat_template,
        )
        classes = _classes(rows, held_out, source.data.labels) if is_labelled else None
    if json:
        print_json({**report.to_dict(), **({"classes": dataclasses.asdict(classes)} if classes else {})})
    else:
        print(report)
        if classes is not None:
            print("\n".join([str(classes), *(f"warning: {text}" for text in classes.warnings)]))
    if report.exit_status:
        raise typer.Exit(EXIT_FAILED)


def show(
    what: What,
    count: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")] = 3,
    base: Base = None,
    max_length: MaxLength = None,
    format: Format = None,
    train_on: TrainOn = None,
    json: Json = False,
) -> None:
    """Show rows as the model sees them, with the spans that are trained in colour."""
    from veneer.cli.output import console, print_json, say, stdout_reserved
    from veneer.cli.rows import needed_base, open_source, rows_of

    with stdout_reserved(json):
        from veneer.data.render import render
        from veneer.data.show import show as show_rows

        source = open_source(what, base=base, max_length=max_length, eval_data=None, format=format, train_on=train_on)
        name = None if source.data.format == "labelled" else needed_base(source)
        rows, _ = rows_of(source.data)
        if name is not None:
            tokenizer = _tokenizer(name, source.revision)
            dataset = render(
                rows.subset(range(min(count, len(rows))), rows.description),
                tokenizer,
                max_length=source.max_length,
                train_on=source.data.train_on,
                overlong=source.data.overlong,
                chat_template=source.data.chat_template,
            )
    if name is None:
        _print_labelled(rows, count, json)
        return
    if json:
        print_json([_row(example, tokenizer) for example in dataset])
        return
    say(rows.description)
    console().print(show_rows(dataset, tokenizer, count))
    for warning in dataset.stats.warnings:
        say(f"warning: {warning}")


def _print_labelled(rows: Rows, count: int, json: bool) -> None:
    """Texts and their classes: what a classifier reads, and what it is trained on."""
    from veneer.cli.output import print_json, say
    from veneer.data.labelled import labelled

    shown = labelled(rows)[:count]
    if json:
        print_json([{"row_id": row.row_id, "text": row.text, "pair": row.pair, "label": row.label} for row in shown])
        return
    say(rows.description)
    for row in shown:
        pair = "" if row.pair is None else f"\n  and: {row.pair}"
        print(f"{row.row_id}\n  text: {row.text}{pair}\n  label: {row.label}")


def _classes(rows: Rows, held_out: Rows | None, names: list[str] | None) -> Classes:
    from veneer.data.classes import find_classes

    return find_classes(rows, held_out, names)


def _tokenizer(base: str, revision: str | None) -> Any:
    from veneer.models import load_tokenizer

    return load_tokenizer(base, revision=revision)


def _row(example: Any, tokenizer: Any) -> dict[str, Any]:
    """Ids, mask, and the text cut where the mask changes."""
    from veneer.data.show import stretches

    return {
        "row_id": example.row_id,
        "spans": [{"text": text, "trained": trained} for text, trained in stretches(example, tokenizer)],
        "input_ids": example.input_ids.tolist(),
        "trained": example.trained.tolist(),
    }
