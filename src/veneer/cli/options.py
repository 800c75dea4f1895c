"""Options that several commands share, worded once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="RUN_OR_BASE", help="A run folder, an adapter folder, or a base model.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32; auto is the run's own.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0 or mps.")]
Base = Annotated[str | None, typer.Option(help="The base to put an adapter on, if it is not where it was.")]
AllowBaseMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Put the adapter on a base with other weights than its own.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens with this share.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many likeliest tokens; 0 is all.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts answered at once.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
