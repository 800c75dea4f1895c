"""``veneer train``: a recipe becomes a run folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import Json, Overwrite, Quiet
from veneer.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from veneer.recipe import Recipe
    from veneer.train import TrainResult


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML). `veneer recipe` lists its keys.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Keys to change, such as train.learning_rate=1e-3 data.eval=null."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
    overwrite: Overwrite = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say what runs on what.")] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Before the first step, compare every layer with float32, not one."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter. Ctrl-C writes a checkpoint; --resume goes on from it.

    Several processes: torchrun --nproc-per-node 2 -m veneer train RECIPE.
    """
    from veneer.cli.output import print_json, stdout_reserved
    from veneer.cli.progress import training_progress
    from veneer.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with stdout_reserved(json):
        from veneer.train import train_recipe

        result = train_recipe(
            loaded,
            resume=resume,
            overwrite=overwrite,
            progress=training_progress(quiet=quiet),
            strict=strict,
            explain=explain,
        )
    if _is_main_process():
        if json:
            print_json(_document(result))
        else:
            _print_result(result, loaded, recipe, overrides or [])
    if result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _document(result: TrainResult) -> dict[str, object]:
    return {
        "run": str(result.path),
        "adapter": str(result.adapter),
        "report": str(result.report),
        "steps": result.steps,
        "epochs": result.epochs,
        "best_step": result.best_step,
        "interrupted": result.interrupted,
        "early_stopped": result.early_stopped,
        "metrics": result.metrics,
        "training": result.training,
    }


def _print_result(result: TrainResult, loaded: Recipe, recipe: Path, overrides: list[str]) -> None:
    from veneer.cli.output import short_path
    from veneer.cli.progress import duration

    run = short_path(result.path)
    if result.interrupted:
        again = shlex.join(["veneer", "train", str(recipe), *overrides, "--resume"])
        print(f"interrupted after step {result.steps}; the checkpoint is written\nnext:    {again}")
        return
    lines: dict[str, str] = {}
    for name, value in result.metrics.items():
        before = result.metrics.get(f"base_{name}")
        if name.startswith("eval_") and before is not None:
            lines[name.removeprefix("eval_")] = f"{before:.4g} before, {value:.4g} after"
    if result.best_step is not None and result.best_step != result.steps:
        lines["kept"] = f"step {result.best_step} of {result.steps}, the best by {loaded.best_metric[0]}"
    if result.training.get("seconds"):
        lines["time"] = duration(result.training["seconds"])
    lines["adapter"] = short_path(result.adapter)
    lines["report"] = short_path(result.report)
    width = max(len(name) for name in lines) + 1
    for name, text in lines.items():
        print(f"{name + ':':<{width}} {text}")
    if loaded.is_classification:
        print(f"next: veneer generate {shlex.quote(run)} 'a text', or: veneer eval {shlex.quote(run)}")
    else:
        print(f"next: veneer chat {shlex.quote(run)}, or: veneer data show {shlex.quote(run)}")
