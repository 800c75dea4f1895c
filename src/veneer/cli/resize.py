"""``veneer resize``: an adapter cut down to fewer ranks, with what that costs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import AllowBaseMismatch, Base, BatchSize, Device, Dtype, Json, Overwrite, Quiet

if TYPE_CHECKING:
    from rich.table import Table

    from veneer.ship import ResizedAdapter


def resize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")],
    output: Annotated[Path, typer.Option(help="The folder of the smaller adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of every layer.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Instead: what share of its squared singular values each layer keeps, such as 0.99; the ranks follow.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Held-out rows to measure before and after on. Of a run, by default its own.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            "-m",
            help="What is measured: names as in veneer eval, with commas.  [default: perplexity; a classifier's own]",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure before and after.")] = True,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Measure on a sample of so many rows.")] = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    base: Base = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter with fewer ranks, as near to the old one as its ranks allow; each layer's error is printed.

    The error of a layer is the norm of what was cut off over the norm of its update. With held-out rows the metric is
    measured with both adapters.
    """
    from veneer.cli.output import console, print_json, short_path, stdout_reserved
    from veneer.cli.progress import Counter
    from veneer.run import is_classifier

    with stdout_reserved(json):
        from veneer.ship import resize_adapter

        resized = resize_adapter(
            run,
            output,
            rank=rank,
            energy=energy,
            data=data,
            metrics=None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()],
            measure=measure,
            max_rows=max_rows,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            base=base,
            allow_base_mismatch=allow_base_mismatch,
            overwrite=overwrite,
            progress=Counter(quiet=quiet),
        )
    if json:
        print_json(resized.to_dict())
        return
    console().print(_table(resized))
    ranks = sorted(layer.rank for layer in resized.layers)
    span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    print(
        f"{span}: {resized.parameters_before:,} numbers became {resized.parameters:,}, error {_percent(resized.error)}"
    )
    if resized.before is not None:
        for name, values in resized.metrics().items():
            before, after = values["before"], values["after"]
            print(f"{name} on {len(resized.before.rows):,} held-out rows: {before:.5g} before, {after:.5g} after")
    for note in resized.notes:
        print(f"note: {note}")
    folder = short_path(resized.folder)
    print(f"adapter: {folder}")
    metric = "" if is_classifier(resized.folder) else " --metrics perplexity"
    print(f"next:    veneer eval {shlex.quote(folder)} --data FILE{metric}")


def _table(resized: ResizedAdapter) -> Table:
    from rich.table import Table

    table = Table(title="what each layer loses", title_justify="left")
    for name in ("layer", "rank before", "rank", "error"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in resized.layers:
        table.add_row(layer.path, str(layer.rank_before), str(layer.rank), _percent(layer.error))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
