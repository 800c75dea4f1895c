"""Metrics for answers that must be JSON: valid, equal, equal field by field."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any, NoReturn

from veneer.errors import DataError

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)


class _NotJson(ValueError):
    """What Python's parser lets pass and RFC 8259 does not, or leaves to chance."""


def parse_strict(text: str, *, fenced: bool = False) -> Any:
    """The value of a JSON text by RFC 8259, with white space around it and nothing else.

    Python's parser also takes NaN and Infinity, and the last of two equal keys; both are refused here, since the next
    reader may refuse or read them differently. Numbers with a fraction or an exponent come back as ``Decimal``.

    Args:
        text: the whole answer.
        fenced: also accept an answer that is one Markdown code block around the JSON.

    Raises:
        ValueError: not JSON.
    """
    if fenced and (block := _FENCE.fullmatch(text)):
        text = block[1]
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=Decimal, object_pairs_hook=_unique)
    except RecursionError as error:
        raise _NotJson("nested too deeply") from error


def _refuse(name: str) -> NoReturn:
    raise _NotJson(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _NotJson("a key stands twice")
    return value


def same_json(left: Any, right: Any) -> bool:
    """Equal as JSON, types included: 1 is neither true nor "1" nor 1.0; 1.5 is 1.50; key order is nothing."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same_json(a, b) for a, b in zip(left, right))
    return bool(left == right)


def json_valid(prediction: str, reference: str = "", *, fenced: bool = False) -> float:
    """1 where the whole answer is strict JSON (see :func:`parse_strict`); the reference is not looked at."""
    try:
        parse_strict(prediction, fenced=fenced)
    except ValueError:
        return 0.0
    return 1.0


def json_exact(prediction: str, reference: str) -> float:
    """1 where both are the same JSON value (see :func:`same_json`).

    Raises:
        DataError: the reference is not JSON.
    """
    expected = _reference(reference)
    try:
        return float(same_json(parse_strict(prediction), expected))
    except ValueError:
        return 0.0


def json_fields(prediction: str, reference: str) -> dict[str, float]:
    """For each top-level field of the reference, 1 where the answer has the same value there; and their mean.

    An answer that is no JSON object has every field wrong. Fields that only the answer has are not counted: json_exact
    sees them.

    Returns:
        ``{"json_fields": mean, "json_fields.NAME": 0 or 1, ...}``

    Raises:
        DataError: the reference is not a JSON object, or an empty one.
    """
    expected = _reference(reference)
    if not isinstance(expected, dict) or not expected:
        raise DataError(
            "the reference is not a JSON object with fields",
            fix="use json_exact for lists and plain values, or mend the row",
        )
    try:
        parsed = parse_strict(prediction)
    except ValueError:
        parsed = None
    answer = parsed if isinstance(parsed, dict) else {}
    fields = {name: float(name in answer and same_json(answer[name], value)) for name, value in expected.items()}
    mean = sum(fields.values()) / len(fields)
    return {"json_fields": mean, **{f"json_fields.{name}": value for name, value in fields.items()}}


def _reference(text: str) -> Any:
    try:
        return parse_strict(text)
    except ValueError as error:
        line = " ".join(text.split())
        shown = line if len(line) <= 60 else line[:59] + "…"
        raise DataError(
            f"the reference is not JSON ({error}): '{shown}'",
            fix="use a metric that does not parse the reference, or mend the row",
        ) from error
