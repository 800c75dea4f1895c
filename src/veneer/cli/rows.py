"""What ``RECIPE|RUN|FILE`` means to the commands that look at data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.data import Rows
    from veneer.recipe import DataRecipe


@dataclass(frozen=True)
class Source:
    """Rows to look at, and how they would be trained on."""

    data: DataRecipe
    base: str | None  # whose tokenizer and template render them
    revision: str | None
    max_length: int | None


def open_source(
    what: str, *, base: str | None, max_length: int | None, eval_data: str | None, **changes: Any
) -> Source:
    """A recipe's data, a run's, or a file's; what the command line names goes first.

    Args:
        what: a recipe (.yaml), a run folder, or anything that ``veneer.data.read`` takes.
        changes: keys of the recipe's section ``data``, None where they were not given.
    """
    from veneer.recipe import DataRecipe, load_recipe
    from veneer.run import is_run, open_run

    given = {key: value for key, value in changes.items() if value is not None}
    if eval_data is not None:
        given["eval"] = eval_data
    path = Path(what)
    if is_run(path) or path.suffix.lower() in (".yaml", ".yml"):
        recipe = open_run(path).recipe if is_run(path) else load_recipe(path)
        data = DataRecipe(**(recipe.data.model_dump() | given))
        revision = None if base else recipe.revision
        return Source(data, base or recipe.base, revision, max_length or recipe.train.max_length)
    return Source(DataRecipe(**({"train": what, "eval": None} | given)), base, None, max_length)


def rows_of(data: DataRecipe) -> tuple[Rows, Rows | None]:
    """The training and the held-out rows that a recipe's section names: the same ones that training takes."""
    from veneer.data.read import read
    from veneer.data.split import split
    from veneer.run import held_out_rows

    rows = read(data.train, limit=data.max_rows, format=data.format, columns=data.columns)
    if isinstance(data.eval, int | float):
        return split(rows, data.eval, data.split_seed)
    return rows, held_out_rows(data)


def needed_base(source: Source) -> str:
    """The base whose tokenizer is needed.

    Raises:
        UsageError: none is named.
    """
    if source.base is None:
        raise UsageError(
            "no base is named, and rendering rows needs its tokenizer",
            where="--base",
            fix="--base smollm2-135m, for example",
        )
    return source.base
