"""Labelled rows: a text, or a pair of texts, and the one class that it belongs to.

The shape ``labelled`` is never guessed among the others: a table of texts and labels could also be meant as prompts and
answers. ``task: classification`` in the recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veneer.data.conversation import Conversation, Rows, normalise
from veneer.errors import DataError, UsageError, did_you_mean

FORMAT = "labelled"
FIELDS = ("text", "pair", "label")

# What people call these columns, best first: taken without ``columns``, and said aloud.
_PAIRS = (
    ("text", "pair"),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_TEXTS = ("text", "sentence", "review", "content", "message")
_LABELS = ("label", "labels", "category", "class", "target", "intent", "sentiment")


@dataclass(frozen=True)
class LabelledRow(Conversation):
    """A row of ``text`` (with its ``pair``, if there is one) and the name of its class; None where it has none."""

    pair: str | None = None
    label: str | None = None

    @cached_property
    def group(self) -> str:
        """Rows with the same texts must stay on one side of a split, whatever their labels."""
        return normalise(self.text or "") + ("" if self.pair is None else "\0" + normalise(self.pair))

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-able data, without its id."""
        pair = {} if self.pair is None else {"pair": self.pair}
        return {"text": self.text, **pair, "label": self.label}


@dataclass(frozen=True)
class LabelledShape:
    """The file's column for each field; ``label`` is missing where rows are only to be predicted."""

    columns: Mapping[str, str]
    format: str = FORMAT

    def describe(self, present: list[str]) -> str:
        """What is read from which column, and which columns are not used."""
        used = ", ".join(f"{name}: '{column}'" for name, column in self.columns.items())
        ignored = [repr(column) for column in present if column not in self.columns.values()]
        return f"read as labelled ({used})" + (f"; not used: {', '.join(ignored)}" if ignored else "")

    def convert(self, row: Mapping[str, Any], row_id: str, where: str) -> LabelledRow:
        """The row; its label is what the file says, as text.

        Raises:
            DataError: a text is missing or no text; a label is a list or a fraction.
        """
        text = self._text(row, "text", where)
        pair = self._text(row, "pair", where) if "pair" in self.columns else None
        label = _label(row.get(self.columns["label"]), where) if "label" in self.columns else None
        return LabelledRow((), row_id, text=text, kind="text", pair=pair, label=label)

    def _text(self, row: Mapping[str, Any], name: str, where: str) -> str:
        value = row.get(self.columns[name])
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            kind = "nothing" if value is None else type(value).__name__
            raise DataError(
                f"column '{self.columns[name]}' holds {kind}, not text",
                where=where,
                fix="fill it in or remove the row, or name another column under data.columns",
            )
        return str(value)


def recognise_labelled(present: list[str], where: str, columns: Mapping[str, str] | None) -> LabelledShape:
    """The columns that hold the texts and the label.

    Args:
        present: the columns of the first row.
        columns: what the user says of ``text``, ``pair`` and ``label``.

    Raises:
        UsageError: a field or a column that does not exist.
        DataError: no column of text is known by its name, or several could be the label.
    """
    mapped = dict(columns or {})
    listed = ", ".join(map(repr, present)) or "none"
    for name, column in mapped.items():
        if name not in FIELDS:
            fix = did_you_mean(name, FIELDS) or f"use {', '.join(FIELDS)}"
            raise UsageError(f"unknown field '{name}' of labelled rows", where="data.columns", fix=fix)
        if column not in present:
            fix = did_you_mean(column, present) or "name one of the columns above"
            raise UsageError(
                f"there is no column '{column}' (the rows have {listed})", where=f"{where}, columns.{name}", fix=fix
            )
    if "text" not in mapped and "pair" not in mapped:
        pair = next((pair for pair in _PAIRS if set(pair) <= set(present)), None)
        text = next((name for name in _TEXTS if name in present), None)
        mapped |= {"text": pair[0], "pair": pair[1]} if pair else {"text": text} if text else {}
    if "text" not in mapped:
        raise DataError(
            f"none of the columns {listed} is known to hold the text to classify",
            where=where,
            fix="say which: columns: {text: NAME, label: NAME} (and pair: NAME for the second of two texts)",
        )
    if "label" not in mapped:
        found = [name for name in _LABELS if name in present and name not in mapped.values()]
        if len(found) > 1:
            raise DataError(
                f"each of the columns {', '.join(map(repr, found))} could be the label",
                where=where,
                fix=f"say which: columns: {{label: {found[0]}}}",
            )
        mapped |= {"label": found[0]} if found else {}
    return LabelledShape({name: mapped[name] for name in FIELDS if name in mapped})


def _label(value: Any, where: str) -> str | None:
    """A class's name or number as text; None where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps comes out of many a table as 1.0, 2.0
    if isinstance(value, float):
        raise DataError(
            f"the label is {value}: a number with a fraction is a value to estimate, not a class",
            where=where,
            fix="sort the values into classes first, such as low, middle and high",
        )
    if value is None or isinstance(value, str | int):
        return ("" if value is None else str(value)).strip() or None
    raise DataError(
        f"the label is {type(value).__name__}, and a row has one class here",
        where=where,
        fix="give each row one name or number (of several labels: one run for each, with yes and no)",
    )


def class_id(label: str, names: Sequence[str]) -> int | None:
    """The place of a label in ``names``, which it names or (where no name is like it) counts; else None."""
    if label in names:
        return names.index(label)
    return int(label) if label.isdecimal() and int(label) < len(names) else None


def labelled(rows: Rows) -> list[LabelledRow]:
    """The rows, which have to be labelled ones.

    Raises:
        DataError: some are of another shape.
    """
    found = [row for row in rows.conversations if isinstance(row, LabelledRow)]
    if len(found) < len(rows):
        raise DataError(
            f"{len(rows) - len(found):,} of {len(rows):,} rows have no text with a label: they are {rows.format} rows",
            where=rows.source,
            fix="read them with format: labelled, and columns: {text: NAME, label: NAME} where names are unusual",
        )
    return found
