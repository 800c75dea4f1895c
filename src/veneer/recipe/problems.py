"""From a mapping to a :class:`Recipe`, or to all that is wrong with it at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from veneer.errors import RecipeError, did_you_mean
from veneer.recipe import yamlio
from veneer.recipe.checks import contradictions
from veneer.recipe.hints import VALUES, key_hint
from veneer.recipe.schema import Recipe

Path = tuple[str, ...]
_PLACEHOLDER = "-"  # stands in for a required value while the rest of a broken recipe is checked


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the dotted key ("" for the file itself), what, how to mend it, and where it stands."""

    key: str
    what: str
    fix: str | None = None
    where: str | None = None
    line: int = 0  # for the order of the report; 0 is the command line or the whole file


class RecipeProblems(RecipeError):
    """Everything that is wrong with a recipe.

    Attributes:
        problems: in the order of the file.
    """

    def __init__(self, problems: Sequence[Problem], source: str) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line)
        if len(self.problems) == 1:
            only = self.problems[0]
            super().__init__(only.what, where=only.where or source, fix=only.fix)
            return
        lines = [f"{source} has {len(self.problems)} problems"]
        for problem in self.problems:
            lines.append(f"  {problem.where or source}: {problem.what}" + (f" - {problem.fix}" if problem.fix else ""))
        super().__init__("\n".join(lines))


def build(raw: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that ``raw`` describes, or None and the problems (without places)."""
    raw = {"data": {}, **raw}  # so that a recipe without data is told that data.train is missing
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        problems, bad = _field_problems(error, raw)
    partial = _without(raw, bad)
    try:
        rest = Recipe.model_validate(partial, context={"contradictions": False})
    except ValidationError as error:
        more, _ = _field_problems(error, partial)
        return None, problems + more
    for found in contradictions(rest):
        if not any(_overlap(path, wrong) for path in (found.path, *found.others) for wrong in bad):
            key = ".".join(found.path)
            problems.append(Problem(key, f"{key} {found.what}", found.fix))
    return None, problems


def _field_problems(error: ValidationError, raw: Mapping[str, Any]) -> tuple[list[Problem], list[Path]]:
    """One problem for each key, however many members of a union turned its value down."""
    problems: dict[Path, Problem] = {}
    for item in error.errors():
        path = _key_path(item["loc"])
        if not path or path in problems:
            continue
        key = ".".join(path)
        if item["type"] == "extra_forbidden":
            problems[path] = Problem(key, f"unknown key '{key}'", key_hint(path, all_keys()))
        elif item["type"] == "missing":
            problems[path] = Problem(key, f"{key} is missing", f"give it: {_field_of(path)['description']}")
        else:
            value = _at(raw, path)
            what = f"{key} is {_spoken(value)}; it must be {expected(path)}"
            problems[path] = Problem(key, what, _value_hint(key, path, value))
    return list(problems.values()), list(problems)


def _key_path(loc: tuple[int | str, ...]) -> Path:
    """``loc`` up to the recipe's key: after it pydantic names list indices and members of unions."""
    path: list[str] = []
    schema: Mapping[str, Any] = _schema()
    for part in loc:
        path.append(str(part))
        schema = _deref(schema.get("properties", {}).get(part, {}))
        if "properties" not in schema:
            break
    return tuple(path)


def _value_hint(key: str, path: Path, value: Any) -> str | None:
    try:
        known = VALUES.get((key, value))
    except TypeError:  # a list or a mapping
        known = None
    if known:
        return known
    choices = [str(choice) for member in _members(_field_of(path)) for choice in member.get("enum", ())]
    for given in value if isinstance(value, list) else [value]:
        if isinstance(given, str) and given not in choices and did_you_mean(given, choices):
            return did_you_mean(given, choices)
    if "properties" in _field_of(path):
        return f"write its keys below it, as in  {key}: {{{next(iter(_field_of(path)['properties']))}: ...}}"
    return None


def _spoken(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    text = yamlio.dump(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _at(raw: Any, path: Path) -> Any:
    for part in path:
        if not isinstance(raw, Mapping):
            return raw
        raw = raw.get(part)
    return raw


def _without(raw: Mapping[str, Any], bad: Sequence[Path]) -> dict[str, Any]:
    """``raw`` without the bad keys, so that what is left can be checked; required ones get a placeholder."""
    rest = copy.deepcopy(dict(raw))
    for path in bad:
        section: Any = rest
        for part in path[:-1]:
            if not isinstance(section.get(part), dict):  # a section may stand there as one word
                section.pop(part, None)
                break
            section = section[part]
        else:
            section.pop(path[-1], None)
    rest.setdefault("base", _PLACEHOLDER)
    data = rest.setdefault("data", {})
    if isinstance(data, dict):
        data.setdefault("train", _PLACEHOLDER)
    return rest


def _overlap(one: Path, other: Path) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


# What a key may hold, in words. The JSON schema is the one description; nothing is written down twice.


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _deref(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref") or (schema["allOf"][0].get("$ref") if "allOf" in schema else None)
    return _schema()["$defs"][reference.rpartition("/")[2]] if reference else schema


def _field_of(path: Path) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = _schema()
    for part in path:
        schema = _deref(schema.get("properties", {}).get(part, {}))
    return schema


def all_keys() -> list[str]:
    """Every dotted key and section of a recipe, in order."""
    keys = []
    for name, field in Recipe.model_fields.items():
        keys.append(name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
    return keys


def expected(path: Path) -> str:
    """What the key may hold, in words: "a whole number of at least 1 or null"."""
    return _words(_field_of(path))


def _members(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a union; of a list, those of its items."""
    members = schema.get("anyOf", [schema])
    return [member.get("items", member) for member in members]


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        parts = list(dict.fromkeys(_words(member) for member in schema["anyOf"]))
        return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 2 else " or ".join(parts)
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema or "properties" in schema:
        return "a section of keys"
    kind = schema.get("type")
    if kind == "array":
        return "a list of " + _plural(schema["items"])
    if kind == "object":
        return "a mapping from names to " + _words(schema["additionalProperties"])
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
    return {"string": "text", "boolean": "true or false", "null": "null"}[str(kind)]


def _plural(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "any of " + ", ".join(map(str, schema["enum"]))
    return _words(schema).replace("a whole number", "whole numbers").replace("a number", "numbers")


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    start = f"from {low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    end = f"to {high:g}" if high is not None else f"below {below:g}" if below is not None else ""
    if start and end:
        joint = " to " if low is not None and below is not None else " and " if below is not None else " "
        return f" {start}{joint}{end}"
    if low is not None:
        return f" of at least {low:g}"
    return f" {start or end}" if start or end else ""
