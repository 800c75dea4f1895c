"""YAML with line numbers: YAML 1.2's scalars, no duplicate keys, no tags, and a dump that 1.1 and 1.2 read alike."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]  # ("adapter", "target_modules", 0)

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
# YAML 1.1, PyYAML's dialect, takes 1e-4 for text because it has no dot: every second learning rate of a tutorial.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_PLAIN_TAGS = {"null", "bool", "int", "float", "str", "timestamp", "merge", "value"}  # what a plain scalar resolves to


@dataclass(frozen=True)
class Flaw:
    """Something wrong with the text itself: where (1-based line, or None) and what."""

    line: int | None
    what: str
    fix: str | None = None


@dataclass
class Document:
    """A parsed text: its value, the line of each key and item, and what was wrong with it."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)


def parse(text: str) -> Document:
    """Parses one YAML document; syntax errors, duplicate keys and tags are returned as flaws, never raised."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        document.flaws.append(
            Flaw(mark.line + 1 if mark else None, f"this is not YAML: {what}", _syntax_fix(text, mark))
        )
        return document
    except yaml.YAMLError as error:
        document.flaws.append(Flaw(None, f"this is not YAML: {' '.join(str(error).split())}"))
        return document
    if root is not None:
        document.value = _value(root, (), document, frozenset())
    return document


def _syntax_fix(text: str, mark: Any) -> str | None:
    lines = text.splitlines()
    if mark is not None and mark.line < len(lines) and "\t" in lines[mark.line]:
        return "indent with spaces: YAML allows no tabs"
    return None


def _value(node: yaml.Node, path: Path, document: Document, open_nodes: frozenset[int]) -> Any:
    if id(node) in open_nodes:
        document.flaws.append(Flaw(node.start_mark.line + 1, "an alias that contains itself"))
        return None
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, document)
    inside = open_nodes | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, document, "tag:yaml.org,2002:seq")
        items = []
        for index, child in enumerate(node.value):
            document.lines[(*path, index)] = child.start_mark.line + 1
            items.append(_value(child, (*path, index), document, inside))
        return items
    assert isinstance(node, yaml.MappingNode)
    _refuse_tag(node, document, "tag:yaml.org,2002:map")
    mapping: dict[str, Any] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.flaws.append(Flaw(line, "a key must be a plain name, not a list or a mapping"))
            continue
        key = str(key_node.value)
        if key in mapping:
            first = document.lines[(*path, key)]
            name = ".".join(map(str, (*path, key)))
            document.flaws.append(Flaw(line, f"{name} stands twice (first in line {first})", "keep one of the two"))
            continue
        document.lines[(*path, key)] = line
        mapping[key] = _value(child, (*path, key), document, inside)
    return mapping


def _refuse_tag(node: yaml.Node, document: Document, expected: str) -> None:
    if node.tag != expected:
        document.flaws.append(Flaw(node.start_mark.line + 1, f"the tag {node.tag} is not allowed in a recipe"))


def _scalar(node: yaml.ScalarNode, document: Document) -> Any:
    text = str(node.value)
    if node.style is not None and node.tag == "tag:yaml.org,2002:str":
        return text  # quoted, or a block of text
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
        document.flaws.append(Flaw(node.start_mark.line + 1, f"the tag {node.tag} is not allowed in a recipe"))
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for a number, so that every reader sees the same value."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line breaks of all kinds have to be escaped: folded ones would need the indentation of where they stand.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump(value: Any) -> str:
    """One value in flow style on one line: ``[a, b]``, ``{a: 1}``, ``'no'``, ``1.0e-05``."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
