"""``veneer merge``: an adapter folded into its base, as a plain model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import AllowBaseMismatch, Base, Device, Dtype, Json, Overwrite

if TYPE_CHECKING:
    from rich.table import Table

    from veneer.ship import MergedModel


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")],
    output: Annotated[Path, typer.Option(help="The folder of the merged model.")],
    onto: Annotated[
        str | None,
        typer.Option(
            help="For a run over a quantised base: dequantized (the weights that it was trained over) or original (the "
            "16-bit weights that those were made from).  [default: dequantized]"
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    base: Base = None,
    quantize: Annotated[
        str,
        typer.Option(
            help="What an adapter of another program was trained over: none, nf4, fp4 or int8; auto knows it."
        ),
    ] = "auto",
    allow_base_mismatch: AllowBaseMismatch = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fold an adapter into its base and write a plain model; the drift from the adapted one is measured and printed.

    Over a quantised base the drift of both ways is printed. Onto the dequantised weights is what was trained and
    evaluated, to rounding. Onto the original ones is another model: without the error of the codes, but with an adapter
    that had learnt to make up for some of it.
    """
    from veneer.cli.output import console, print_json, short_path, stdout_reserved

    with stdout_reserved(json):
        from veneer.ship import merge_model

        merged = merge_model(
            run,
            output,
            onto=onto,
            dtype=dtype,
            device=device,
            base=base,
            quantize=quantize,
            allow_base_mismatch=allow_base_mismatch,
            overwrite=overwrite,
        )
    if json:
        print_json(merged.to_dict())
        return
    if merged.trained_over.config is None:
        print(merged.report)
    else:
        console().print(_table(merged))
        print(f"written in {merged.report.dtype}: onto the {merged.onto} weights")
    print(f"measured on {merged.measured_on}" + (f", {merged.report.positions:,} tokens" if not merged.labels else ""))
    folder = short_path(merged.folder)
    print(f"model: {folder} ({merged.bytes / 1e6:,.{0 if merged.bytes >= 1e7 else 1}f} MB)")
    print(f"next:  veneer {'generate' if merged.labels else 'chat'} {shlex.quote(folder)}")


def _table(merged: MergedModel) -> Table:
    """What each way costs, beside the unmerged run."""
    from rich.table import Table

    table = Table(title=f"drift from the unmerged run, over {merged.trained_over}", title_justify="left")
    for name in ("", "mean KL (nats)", "same first choice", "largest logit difference", "perplexity"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("unmerged", "", "", "", f"{merged.report.perplexity_before:.5g}")
    for way, report in merged.drifts.items():
        table.add_row(
            f"onto {way}" + (" (written)" if way == merged.onto else ""),
            f"{report.mean_kl:.3g}",
            f"{100 * report.top1_agreement:.2f} %",
            f"{report.max_abs_logit_difference:.3g}",
            f"{report.perplexity:.5g}",
        )
    return table
