"""The table of commands. A command's file imports what it needs when it runs, so that help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer import __version__
from veneer.cli import bench, chat, data, demo, eval, generate, inspect, merge, recipe, resize, train, version
from veneer.cli.guard import guarded

app = typer.Typer(
    name="veneer",
    help="Fine-tune language models with LoRA, prove that it worked, and ship the result.",
    no_args_is_help=True,
    # Plain help: rich's takes longer to import than everything else, and reads brackets as markup.
    rich_markup_mode=None,
    # Errors are worded in guard.py; what gets past it is a bug of guard.py and deserves Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
_data = typer.Typer(help="Look at data before it is trained on.", no_args_is_help=True, rich_markup_mode=None)

app.command("demo")(guarded(demo.demo))
app.command("train")(guarded(train.train))
app.command("eval")(guarded(eval.evaluate))
app.command("generate")(guarded(generate.generate))
app.command("chat")(guarded(chat.chat))
app.command("inspect")(guarded(inspect.inspect))
app.command("resize")(guarded(resize.resize))
app.command("merge")(guarded(merge.merge))
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(guarded(bench.bench))
app.command("recipe")(guarded(recipe.recipe))
app.command("version")(guarded(version.version))
_data.command("check")(guarded(data.check))
_data.command("show")(guarded(data.show))
app.add_typer(_data, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Fine-tune language models with LoRA, prove that it worked, and ship the result."""
