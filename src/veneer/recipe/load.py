"""Reading a recipe: the file, the overrides of the command line, and the paths in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import RecipeError, did_you_mean, nearest
from veneer.files import absent_folder
from veneer.inbox.parts import SOURCES as BUILT_IN
from veneer.recipe import yamlio
from veneer.recipe.hints import key_hint
from veneer.recipe.problems import Problem, RecipeProblems, all_keys, build, expected
from veneer.recipe.schema import Recipe

# Sections that one word may stand for, and the key that it sets: quantize: nf4.
_ONE_WORD = {"quantize": "scheme"}

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe:
    """The recipe in a YAML file, with ``overrides`` such as ``train.learning_rate=1e-3`` laid over it.

    Relative paths of data are relative to the recipe's folder where they exist there, else to the working directory.
    The recipe that is returned holds absolute paths, and the text of a chat template that was given as a file.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with a dotted key and a value in YAML syntax; the last one wins.
        check_paths: False reads a recipe whose data may have moved since, as that of a finished run.

    Raises:
        RecipeProblems: all that is wrong with the file and the overrides, at once.
        RecipeError: the file cannot be read.
    """
    file = Path(path)
    document = yamlio.parse(_read(file))
    name = _short(file)
    problems = [Problem("", flaw.what, flaw.fix, _place(name, flaw.line), flaw.line or 0) for flaw in document.flaws]
    raw = document.value
    if not isinstance(raw, dict):
        if not problems:
            what = (
                "the recipe is empty" if raw is None else "a recipe is a mapping of keys, such as 'base: smollm2-135m'"
            )
            problems.append(Problem("", what, "begin with the keys base, data.train and output_dir", name))
        raise RecipeProblems(problems, name)
    raw = {key: {} if value is None and key in _sections() else value for key, value in raw.items()}
    from_command_line = _override(raw, overrides, problems)
    raw.setdefault("output_dir", f"runs/{file.stem}")
    recipe, wrong = build(raw)
    for problem in wrong:
        parts: tuple[str | int, ...] = tuple(problem.key.split("."))
        override = next((o for key, o in from_command_line.items() if problem.key == key), None)
        line = _line_of(document, parts)
        where = f"{override} (command line)" if override else _place(name, line)
        problems.append(Problem(problem.key, problem.what, problem.fix, where, 0 if override else line or 0))
    if recipe is not None:
        recipe = _with_paths(recipe, file.absolute().parent, check_paths, problems, document, name)
    if problems or recipe is None:
        raise RecipeProblems(problems, name)
    return recipe


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping describes, for callers in Python: the same checks, the same messages, paths left alone.

    Raises:
        RecipeProblems: all that is wrong with it.
    """
    recipe, problems = build(values)
    if recipe is None:
        raise RecipeProblems(problems, "the recipe")
    return recipe


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        fix = did_you_mean(file.name, (p.name for p in file.parent.glob("*.y*ml"))) if file.parent.is_dir() else ""
        fix = fix or "give the path of a recipe (YAML)"
        raise RecipeError(f"no recipe '{file}'", where=str(file.absolute()), fix=fix) from error
    except IsADirectoryError as error:
        inside = file / "recipe.yaml"
        fix = f"give the file: {inside}" if inside.exists() else "give the path of a recipe (YAML)"
        raise RecipeError(f"'{file}' is a folder, not a recipe", where=str(file.absolute()), fix=fix) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the recipe is not UTF-8 text: {error.reason} at byte {error.start}",
            where=str(file),
            fix="give a YAML file, not a model or a data file",
        ) from error
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", where=str(file)) from error


def _short(file: Path) -> str:
    """The path as the user wrote it, or its name where that is long."""
    return str(file) if len(str(file)) <= 60 else file.name


def _place(name: str, line: int | None) -> str:
    return f"{name}:{line}" if line else name


def _line_of(document: yamlio.Document, path: tuple[str | int, ...]) -> int | None:
    while path:
        if path in document.lines:
            return document.lines[path]
        path = path[:-1]
    return None


def _sections() -> set[str]:
    return {key.partition(".")[0] for key in all_keys() if "." in key}


def _override(raw: dict[str, Any], overrides: Sequence[str], problems: list[Problem]) -> dict[str, str]:
    """Lays the overrides over ``raw``; returns the keys that they set, each with the override as it was written."""
    used: dict[str, str] = {}
    keys = all_keys()
    for override in overrides:
        where = f"{override} (command line)"
        key, equals, text = override.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not key:
            fix = "write key=value, for example train.learning_rate=1e-3"
            problems.append(Problem(key, f"'{override}' is not an override", fix, where))
            continue
        value = yamlio.parse(text)
        if value.flaws:
            fix = f"quote the value: {key}='\"...\"'"
            problems.append(Problem(key, f"the value of {key} is not YAML: {text!r}", fix, where))
            continue
        section, _, rest = key.partition(".")
        name, _, entry = rest.partition(".")
        field = f"{section}.{name}" if name else section
        if field not in keys or (entry and not expected((section, name)).startswith("a mapping")):
            path = tuple(key.split("."))
            problems.append(Problem(key, f"unknown key '{key}'", key_hint(path[:2], keys), where))
            continue
        if field in _ONE_WORD and not name and isinstance(value.value, str | dict):
            is_word = isinstance(value.value, str)
            raw[field] = {_ONE_WORD[field]: value.value} if is_word else value.value
            used[f"{field}.{_ONE_WORD[field]}" if is_word else field] = override
            continue
        if field in _sections():
            fix = f"set its keys one by one, as in {field}.{_first_of(field, keys)}=..."
            problems.append(Problem(key, f"'{key}' is a section", fix, where))
            continue
        target = raw
        if name:
            if not isinstance(raw.get(section), dict):
                word = raw.get(section)
                raw[section] = {_ONE_WORD[section]: word} if section in _ONE_WORD and isinstance(word, str) else {}
            target = raw[section]
        if entry:
            before = target.get(name)
            target[name] = {**(before if isinstance(before, dict) else {}), entry: value.value}
        else:
            target[name or section] = value.value
        used[field] = override
    return used


def _first_of(section: str, keys: list[str]) -> str:
    return next(key for key in keys if key.startswith(f"{section}.")).partition(".")[2]


def _with_paths(
    recipe: Recipe, folder: Path, check: bool, problems: list[Problem], document: yamlio.Document, name: str
) -> Recipe:
    """The recipe with absolute paths; a data file that is nowhere becomes a problem."""

    def found(key: str, text: str) -> str:
        given = Path(text).expanduser()
        for place in (folder / given, Path.cwd() / given):
            if place.exists():
                return str(place.absolute())
        is_path = given.suffix.lower() in DATA_SUFFIXES or text.startswith((".", "~", "/"))
        misspelt = key != "data.chat_template" and text not in BUILT_IN and bool(nearest(text, BUILT_IN))
        if check and (is_path or misspelt):
            line = _line_of(document, tuple(key.split(".")))
            fix = _near(given, [] if given.is_absolute() else list(dict.fromkeys([folder, Path.cwd()])))
            problems.append(Problem(key, f"{key}: no file '{text}'", fix, _place(name, line), line or 0))
        return text

    def found_all(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [found(key, text) for text in value]
        return found(key, value) if isinstance(value, str) else value

    data: dict[str, Any] = {key: found_all(f"data.{key}", getattr(recipe.data, key)) for key in ("train", "eval")}
    template = recipe.data.chat_template
    if template is not None and "{" not in template:
        # The run's recipe has to stand by itself, so it holds the template's text, not the name of a file. A plain word
        # is left alone: it may name one of several templates of the tokenizer.
        file = Path(found("data.chat_template", template))
        if file.is_file():
            data["chat_template"] = file.read_text(encoding="utf-8")
        elif check and (file.suffix or "/" in template):
            line = _line_of(document, ("data", "chat_template"))
            what = f"data.chat_template: no file '{template}'"
            problems.append(Problem("data.chat_template", what, "give a Jinja file", _place(name, line), line or 0))
    base = recipe.base
    for place in (folder / Path(base).expanduser(), Path.cwd() / Path(base).expanduser()):
        if (place / "config.json").is_file() or (place.suffix == ".gguf" and place.is_file()):
            base = str(place.absolute())
            break
    output = str(Path(recipe.output_dir).expanduser().absolute())
    changed = {"base": base, "output_dir": output, "data": recipe.data.model_copy(update=data)}
    return recipe.model_copy(update=changed)


def _near(given: Path, places: list[Path]) -> str:
    """The remedy for a file that is in none of ``places``: names like it, else files beside it, else rows to try."""
    folders = [place / given.parent for place in places] or [given.parent]
    there = sorted({entry.name for folder in folders for entry in folder.glob("*") if entry.is_file()})
    if close := nearest(given.name, [*there, *BUILT_IN]):
        names = [name if name in BUILT_IN else str(given.parent / name) for name in close]
        return f"Did you mean {' or '.join(map(repr, names))}?"
    data = [str(given.parent / name) for name in there if Path(name).suffix.lower() in DATA_SUFFIXES]
    if data:
        return f"data files there: {', '.join(data[:5])}{', ...' if len(data) > 5 else ''}"
    said = [f"looked in {' and in '.join(map(str, places))}"] if places else []
    if not any(folder.is_dir() for folder in folders):
        said.append(absent_folder(given.parent))
    return "; ".join([*said, f"give a file that is there, or the demo's rows: {', '.join(BUILT_IN)}"])
