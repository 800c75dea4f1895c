"""``veneer demo``: the main job on the bundled model and task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Json, Quiet


def demo(
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    data_only: Annotated[bool, typer.Option("--data-only", help="Write the rows into its data/, and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Teach the bundled model a task that it cannot do, measured before and after: minutes on two cores, no network."""
    from veneer.cli.output import console, print_json, stdout_reserved
    from veneer.cli.progress import Counter, training_progress
    from veneer.demo import demo_table, run_demo, write_demo_data

    if data_only:
        paths = write_demo_data(output)
        if json:
            print_json({name: str(path) for name, path in paths.items()})
        else:
            console().print(*(str(path) for path in paths.values()), sep="\n", soft_wrap=True)
        return
    with stdout_reserved(json):
        result = run_demo(output, training_progress(quiet=quiet), Counter(quiet=quiet))
    if json:
        print_json(result)
    else:
        console().print(demo_table(result))
