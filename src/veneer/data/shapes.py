"""The shapes that rows come in, how one is recognised by its columns, and how a row of it becomes a Conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.data.conversation import Conversation, Message, parse_messages, parse_tools
from veneer.errors import DataError, UsageError, did_you_mean

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")
_FORMAT_ALIASES = {
    "chat": "messages",
    "openai": "messages",
    "conversations": "sharegpt",
    "prompt_completion": "prompt-completion",
    "instruction": "alpaca",
    "raw": "text",
}

# The columns of a shape under Veneer's own names; ``columns: {prompt: question, ...}`` maps these to the file's names.
_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt-completion": ("system", "tools"),
    "text": (),
}

# Pairs that people use for a prompt and its answer, best first: recognised without ``columns``, and said aloud.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("user", "assistant"),
)

_LABELS = frozenset({"label", "labels", "category", "class", "target", "intent", "sentiment"})

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A recognised shape: its format, and the file's column for each of its fields (``where`` names the file in
    errors).
    """

    format: str
    columns: Mapping[str, str]

    def describe(self, present: list[str]) -> str:
        """What is read from which column, and which columns are not used."""
        used = ", ".join(
            f"{name}: '{column}'" if name != column else f"'{name}'" for name, column in self.columns.items()
        )
        ignored = [column for column in present if column not in self.columns.values()]
        tail = f"; not used: {', '.join(repr(column) for column in ignored)}" if ignored else ""
        return f"read as {self.format} ({used}){tail}"

    def convert(self, row: Row, row_id: str, where: str) -> Conversation:
        """The conversation that ``row`` stands for.

        Raises:
            DataError: a column is missing in this row or holds something that cannot be used.
        """
        for name in _REQUIRED[self.format]:
            column = self.columns[name]
            if row.get(column) is None:
                there = "is null" if column in row else "is missing"
                near = did_you_mean(column, row) if column not in row else ""
                raise DataError(
                    f"column '{column}' {there} in this row (its columns: {', '.join(map(str, row)) or 'none'})",
                    where=where,
                    fix=near or f"every row of the {self.format} shape needs '{column}': fill it in, or remove the row",
                )
        return _CONVERTERS[self.format](self, row, row_id, where)

    def value(self, row: Row, name: str) -> Any:
        """The row's value for a field, None where the shape or the row has none."""
        return row.get(self.columns[name]) if name in self.columns else None

    def text(self, row: Row, name: str, where: str) -> str:
        """A field as text: numbers are written out, absent is empty."""
        value = self.value(row, name)
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(
                f"column '{self.columns[name]}' holds {type(value).__name__}, not text",
                where=where,
                fix="put text there, or name another column under 'columns'",
            )
        return str(value)


def recognise(present: list[str], where: str, format: str = "auto", columns: Mapping[str, str] | None = None) -> Shape:
    """The shape of rows with the columns ``present``.

    Args:
        present: the first row's columns, in order.
        where: the file, for errors.
        format: "auto", or one of :data:`FORMATS`.
        columns: Veneer's field names to the file's column names.
    Raises:
        UsageError: an unknown format or field, or a named column that the file does not have.
        DataError: no shape fits.
    """
    format = _FORMAT_ALIASES.get(format, format)
    if format != "auto" and format not in FORMATS:
        raise UsageError(
            f"unknown data format '{format}'",
            where="data.format",
            fix=did_you_mean(format, FORMATS) or f"use auto, {', '.join(FORMATS)}",
        )
    mapped = dict(columns or {})
    _check_columns(mapped, present, where, format)
    if format == "auto" and not mapped:
        _refuse_labelled_text(present, where)
    names = [format] if format != "auto" else list(FORMATS)
    for name in names:
        found = {field: mapped.get(field, field) for field in (*_REQUIRED[name], *_OPTIONAL[name])}
        if all(found[field] in present for field in _REQUIRED[name]) and _all_used(mapped, found):
            return Shape(name, {field: column for field, column in found.items() if column in present})
    if not mapped and format in ("auto", "prompt-completion"):
        for prompt, completion in _PAIRS:
            if prompt in present and completion in present:
                extra = {field: field for field in _OPTIONAL["prompt-completion"] if field in present}
                return Shape("prompt-completion", {"prompt": prompt, "completion": completion, **extra})
    if format != "auto":
        wanted = [mapped.get(field, field) for field in _REQUIRED[format]]
        missing = next((column for column in wanted if column not in present), wanted[0])
        raise DataError(
            f"the {format} shape needs the column '{missing}', and the rows have {_listed(present)}",
            where=where,
            fix=did_you_mean(missing, present) or "say under 'columns' which column it is, or use format: auto",
        )
    raise DataError(
        f"no known shape has the columns {_listed(present)}",
        where=where,
        fix=(
            "say which columns hold the prompt and the answer, as in columns: {prompt: question, completion: answer}; "
            "known shapes: messages, conversations (ShareGPT), instruction/output (Alpaca), prompt/completion, text"
        ),
    )


def _check_columns(mapped: Mapping[str, str], present: list[str], where: str, format: str) -> None:
    formats = FORMATS if format == "auto" else (format,)
    known = sorted({field for name in formats for field in (*_REQUIRED[name], *_OPTIONAL[name])})
    for field, column in mapped.items():
        if field not in known:
            raise UsageError(
                f"unknown field '{field}' under columns",
                where="data.columns",
                fix=did_you_mean(field, known) or f"use one of {', '.join(known)}",
            )
        if column not in present:
            raise UsageError(
                f"there is no column '{column}' (the rows have {_listed(present)})",
                where=f"{where}, columns.{field}",
                fix=did_you_mean(column, present) or "name one of the columns above",
            )


def _refuse_labelled_text(present: list[str], where: str) -> None:
    """A table of texts and labels would pass for raw text, and the labels would never be learnt."""
    label = next((column for column in present if column.lower() in _LABELS), None)
    if (
        "text" in present
        and label
        and not any(set(_REQUIRED[name]) <= set(present) for name in FORMATS if name != "text")
    ):
        raise DataError(
            f"there is a 'text' column and a '{label}' column: raw text, or texts to be labelled?",
            where=where,
            fix=f"write columns: {{prompt: text, completion: {label}}} to learn labels, or format: text for raw text",
        )


def _all_used(mapped: Mapping[str, str], found: Mapping[str, str]) -> bool:
    return all(field in found for field in mapped)


def _listed(columns: list[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "none"


def _messages(shape: Shape, row: Row, row_id: str, where: str) -> Conversation:
    messages = parse_messages(shape.value(row, "messages"), where)
    return Conversation(messages, row_id, parse_tools(shape.value(row, "tools"), where))


def _sharegpt(shape: Shape, row: Row, row_id: str, where: str) -> Conversation:
    messages = parse_messages(shape.value(row, "conversations"), where, sharegpt=True)
    messages = (*_system(shape, row, where), *messages)
    return Conversation(messages, row_id, parse_tools(shape.value(row, "tools"), where))


def _alpaca(shape: Shape, row: Row, row_id: str, where: str) -> Conversation:
    instruction, extra = shape.text(row, "instruction", where), shape.text(row, "input", where)
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    answer = Message("assistant", shape.text(row, "output", where))
    return Conversation((*_system(shape, row, where), Message("user", prompt), answer), row_id)


def _prompt_completion(shape: Shape, row: Row, row_id: str, where: str) -> Conversation:
    prompt, completion = shape.value(row, "prompt"), shape.value(row, "completion")
    system, tools = _system(shape, row, where), parse_tools(shape.value(row, "tools"), where)
    if isinstance(prompt, list) or isinstance(completion, list):
        before = parse_messages(prompt, where) if isinstance(prompt, list) else (_user(shape, row, where),)
        after = parse_messages(completion, where) if isinstance(completion, list) else (_answer(shape, row, where),)
        # Earlier assistant turns inside the prompt are history: only the completion is what the row teaches.
        history = tuple(_untrained(message) for message in before)
        return Conversation((*system, *history, *after), row_id, tools)
    pair = (_user(shape, row, where), _answer(shape, row, where))
    plain = not system and not tools
    return Conversation((*system, *pair), row_id, tools, kind="prompt-completion" if plain else "chat")


def _text(shape: Shape, row: Row, row_id: str, where: str) -> Conversation:
    return Conversation((), row_id, text=shape.text(row, "text", where), kind="text")


def _system(shape: Shape, row: Row, where: str) -> tuple[Message, ...]:
    text = shape.text(row, "system", where)
    return (Message("system", text),) if text.strip() else ()


def _user(shape: Shape, row: Row, where: str) -> Message:
    return Message("user", shape.text(row, "prompt", where))


def _answer(shape: Shape, row: Row, where: str) -> Message:
    return Message("assistant", shape.text(row, "completion", where))


def _untrained(message: Message) -> Message:
    if message.role != "assistant" or message.train is not None:
        return message
    return Message(message.role, message.content, message.tool_calls, message.name, message.extra, train=False)


_CONVERTERS: dict[str, Callable[[Shape, Row, str, str], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
