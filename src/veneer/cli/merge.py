"""``veneer merge``: an adapter folded into its base, as a plain model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import AllowBaseMismatch, Base, Device, Dtype, Json, Overwrite


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")],
    output: Annotated[Path, typer.Option(help="The folder of the merged model.")],
    dtype: Dtype = "auto",
    device: Device = "auto",
    base: Base = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fold an adapter into its base and write a plain model; the drift from the adapted one is measured and printed."""
    from veneer.cli.output import print_json, short_path, stdout_reserved

    with stdout_reserved(json):
        from veneer.ship import merge_model

        merged = merge_model(
            run,
            output,
            dtype=dtype,
            device=device,
            base=base,
            allow_base_mismatch=allow_base_mismatch,
            overwrite=overwrite,
        )
    if json:
        print_json(merged.to_dict())
        return
    print(merged.report)
    folder = short_path(merged.folder)
    print(f"model: {folder} ({merged.bytes / 1e6:,.0f} MB)")
    print(f"next:  veneer chat {shlex.quote(folder)}")
