"""``veneer recipe``: the keys of a recipe, or one recipe with every key filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Json


def recipe(
    file: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe to check and fill in.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change.")] = None,
    json: Json = False,
) -> None:
    """Print all keys with their defaults and meanings; with RECIPE, check it and print it with every key filled in."""
    from veneer.cli.output import print_json
    from veneer.recipe import Recipe, load_recipe, recipe_reference

    if file is None:
        if json:
            print_json(Recipe.model_json_schema())
        else:
            print(recipe_reference(), end="")
        return
    loaded = load_recipe(file, overrides or [])
    if json:
        print_json(loaded.resolved())
    else:
        print(loaded.to_yaml(), end="")
