"""A recipe written out: as commented YAML, and the table of all keys. Both read the schema, so neither can go stale."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from veneer.recipe import yamlio
from veneer.recipe.problems import expected
from veneer.recipe.schema import Recipe


def write_yaml(recipe: Recipe, *, comments: bool = True) -> str:
    """See :meth:`Recipe.to_yaml`."""
    lines: list[str] = []
    width = 44 if comments else 0
    for name, field in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            lines.append(_line(name, "", field, width))
            for inner, inner_field in type(value).model_fields.items():
                text = yamlio.dump(_plain(getattr(value, inner)))
                lines.append("  " + _line(inner, text, inner_field, width - 2))
        else:
            lines.append(_line(name, yamlio.dump(_plain(value)), field, width))
    return "\n".join(lines) + "\n"


def _line(name: str, text: str, field: FieldInfo, width: int) -> str:
    """``name: text  # description`` with the comment after column ``width``; 0 or less writes none."""
    line = f"{name}: {text}".rstrip()
    return f"{line:<{width}}  # {field.description}" if width > 0 and field.description else line


def _plain(value: Any) -> Any:
    """Whole floats as they were written: 3, not 3.0; the schema makes floats of them again."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def recipe_reference() -> str:
    """All keys of a recipe as Markdown: one table for the top and one for each section."""
    parts = ["## A recipe", "", *_table("", Recipe)]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts += ["", f"## {name}", "", section.__doc__ or "", "", *_table(name, section)]
    return "\n".join(parts) + "\n"


def _table(prefix: str, section: type[BaseModel]) -> list[str]:
    rows = ["| key | default | holds | what it does |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        key = f"{prefix}.{name}" if prefix else name
        default = "**required**" if field.is_required() else f"`{yamlio.dump(_plain(field.default))}`"
        holds = expected((prefix, name) if prefix else (name,))
        rows.append(f"| `{key}` | {default} | {holds} | {field.description} |".replace("||", "|"))
    return rows
