"""``veneer bench``: the benchmarks that lie beside the source."""

from __future__ import annotations

from typing import Annotated

import typer

BENCHMARKS = {
    "sft": "training against TRL and PEFT",
    "qlora": "4 bits against bitsandbytes with PEFT",
    "generation": "generation against transformers",
    "variants": "the variants of LoRA against each other",
    "quantisation": "what 4 and 8 bits lose",
    "moe_memory": "experts by grouped products against dense deltas",
    "memory": "the memory of 4 bits by formula: docs/memory.md",
    "intrinsic_dimension": "how few numbers the demo's task needs",
    "performance": "speed and memory, and how both grow: docs/performance.md",
    "gpu": "training and decoding on an NVIDIA GPU",
}


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of " + ", ".join(BENCHMARKS) + ".")] = "sft",
) -> None:
    """Compare speed and memory with the peers that are installed.

    What follows NAME goes to the benchmark: veneer bench sft --peers trl,peft --quantize nf4. Its own help comes with
    veneer bench NAME -- --help.
    """
    import os
    import subprocess
    import sys
    from pathlib import Path

    from veneer.errors import UsageError, did_you_mean

    options = list(context.args)
    if name.startswith("-"):
        name, options = "sft", [name, *options]
    if name not in BENCHMARKS:
        known = "\n".join(f"  {key:<14}{text}" for key, text in BENCHMARKS.items())
        hint = did_you_mean(name, BENCHMARKS) or "use one of"
        raise UsageError(f"unknown benchmark '{name}'", fix=f"{hint}\n{known}")
    source = Path(__file__).parents[3]  # of an editable installation
    if not (source / "benchmarks" / f"{name}.py").is_file():
        raise UsageError(
            "the benchmarks come with the source, not with the installed package",
            where=str(source),
            fix="clone the repository, pip install -e it, and run veneer bench there",
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
