"""What one training row is: messages, tools, or raw text, and the sentence about where a set of rows came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from veneer.errors import DataError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# ShareGPT and the vendors' own names for the same three speakers.
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}

_OWN_KEYS = {"role", "content", "tool_calls", "function_call", "name", "train", "weight"}

RowKind = Literal["chat", "prompt-completion", "text"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    ``train`` is None where the run's ``train_on`` decides; True and False override it for this turn (assistant turns
    only). ``extra`` holds every other key of the message (``reasoning_content``, ``tool_call_id``, ...): the chat
    template sees it.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing was said: no text beyond white space, no tool call, no reasoning."""
        return not (self.content.strip() or self.tool_calls or any(self.extra.get(key) for key in REASONING_KEYS))

    def to_template(self) -> dict[str, Any]:
        """The dict that a chat template reads; absent fields are absent keys, since templates test ``'tool_calls' in
        m``.
        """
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            message["name"] = self.name
        message.update({key: value for key, value in self.extra.items() if value is not None})
        # Templates disagree about the key for reasoning; transformers fills them all, so the text here equals its text.
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        return message


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """One row of data.

    ``row_id`` names it for people: the file and the 1-based line (JSONL, CSV, text) or row (JSON, Parquet, hub).
    A raw-text row has ``text`` and no messages. ``kind`` is "prompt-completion" where the row was two plain strings:
    such a row can be trained on by a model without a chat template too.
    """

    messages: tuple[Message, ...]
    row_id: str
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    kind: RowKind = "chat"

    @cached_property
    def group(self) -> str:
        """Rows with the same group must stay on one side of a split: the normalised prompt, or the text itself."""
        if self.text is not None:
            return normalise(self.text)
        first = next((i for i, message in enumerate(self.messages) if message.role == "assistant"), len(self.messages))
        # A conversation that the assistant opens has no prompt: then all of it is the group.
        prompt = self.messages[:first] or self.messages
        return "\n".join(normalise(message.content) for message in prompt)

    @cached_property
    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as a chat template reads them."""
        return [message.to_template() for message in self.messages]

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything but the row id: equal for exact duplicates."""
        return hashlib.sha256(_canonical(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-able data, in the ``messages`` shape (or ``text``), without its id."""
        if self.text is not None:
            return {"text": self.text}
        messages = []
        for message in self.messages:
            entry: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
            if message.tool_calls:
                entry["tool_calls"] = list(message.tool_calls)
            if message.name is not None:
                entry["name"] = message.name
            if message.train is not None:
                entry["train"] = message.train
            messages.append(entry)
        row: dict[str, Any] = {"messages": messages}
        if self.tools:
            row["tools"] = list(self.tools)
        return row


@dataclass
class Rows:
    """A set of conversations and where it came from.

    ``description`` is the sentence to say aloud about how the source was understood. ``files`` maps each file read to
    the SHA-256 of its bytes (empty for rows that did not come from files).
    """

    conversations: list[Conversation]
    format: str
    source: str
    description: str
    files: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conversations)

    @cached_property
    def content_hash(self) -> str:
        """Hex SHA-256 of what the rows say, in order, with their ids.

        Taken from the parsed rows, not from the file: so it covers the format, the columns, the limit and the split
        as well.
        """
        digest = hashlib.sha256()
        for row in self.conversations:
            digest.update(f"{row.row_id}\0{row.kind}\0{row.digest}\n".encode())
        return digest.hexdigest()

    @property
    def system(self) -> str | None:
        """The system message that every conversation begins with; None where they differ or have none."""
        first = {row.messages[0].content if row.messages and row.messages[0].role == "system" else None for row in self}
        return first.pop() if len(first) == 1 else None

    @property
    def single_turn(self) -> bool:
        """No conversation goes on after its first answer."""
        return all(sum(message.role == "assistant" for message in row.messages) <= 1 for row in self)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)

    def subset(self, indices: Sequence[int], description: str) -> Rows:
        """The rows at ``indices``, under a new description."""
        picked = [self.conversations[index] for index in indices]
        return Rows(picked, self.format, self.source, description, dict(self.files))


def normalise(text: str) -> str:
    """Case and white space folded, for telling whether two prompts are the same."""
    return re.sub(r"\s+", " ", text).strip().casefold()


def parse_messages(value: Any, where: str, *, sharegpt: bool = False) -> tuple[Message, ...]:
    """Messages from a row's list of dicts (``role``/``content``, or ShareGPT's ``from``/``value``).

    Args:
        value: the list, or a JSON string of it (CSV cells).
        where: the file and line, for errors.
    Raises:
        DataError: not a list of dicts, a missing key, an unknown role, content that is not text.
    """
    value = _from_json_cell(value, where, "the messages")
    if not isinstance(value, list):
        raise DataError(
            f"the messages are {_kind(value)}, not a list", where=where, fix="give a list of role/content objects"
        )
    if not value:
        raise DataError("the list of messages is empty", where=where, fix="remove the row, or give it messages")
    return tuple(_message(item, f"{where}, message {number}", sharegpt) for number, item in enumerate(value, 1))


def _message(item: Any, where: str, sharegpt: bool) -> Message:
    if not isinstance(item, dict):
        raise DataError(
            f"a message is {_kind(item)}, not an object", where=where, fix='write {"role": ..., "content": ...}'
        )
    if sharegpt or ("from" in item and "role" not in item):
        item = {"role" if key == "from" else "content" if key == "value" else key: entry for key, entry in item.items()}
    if "role" not in item:
        raise DataError(
            f"a message has no role (its keys: {', '.join(map(str, item)) or 'none'})",
            where=where,
            fix="each message needs 'role' and 'content' (or ShareGPT's 'from' and 'value')",
        )
    role, called_as = _role(item["role"], where)
    content = item.get("content")
    calls: Any = item.get("tool_calls")
    if called_as in ("function_call", "tool_call"):
        calls, content = [_from_json_cell(content, where, "the tool call")], ""
    elif item.get("function_call") and not calls:
        calls = [{"type": "function", "function": item["function_call"]}]
    calls = _from_json_cell(calls, where, "the tool calls") or []
    if not isinstance(calls, list):
        raise DataError(f"tool_calls is {_kind(calls)}, not a list", where=where, fix="give a list of calls")
    if "content" not in item and not calls:
        raise DataError("a message has no content", where=where, fix="give it 'content', or remove the message")
    return Message(
        role=role,
        content=_content(content, where),
        tool_calls=tuple(_tool_call(call, where) for call in calls),
        name=item.get("name"),
        extra={key: entry for key, entry in item.items() if key not in _OWN_KEYS and entry is not None},
        train=_train_flag(item, role, where),
    )


def _role(value: Any, where: str) -> tuple[str, str]:
    name = str(value).strip().lower()
    role = ROLE_ALIASES.get(name, name)
    if role not in ROLES:
        known = [*ROLES, *ROLE_ALIASES]
        raise DataError(
            f"unknown role '{value}'", where=where, fix=did_you_mean(name, known) or f"use one of {', '.join(known)}"
        )
    return role, name


def _content(value: Any, where: str) -> str:
    """Text, or the joined texts of a list of parts; anything else (images, numbers) is refused."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = []
        for part in value:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                kind = part.get("type", "unknown") if isinstance(part, dict) else _kind(part)
                raise DataError(
                    f"a content part of type '{kind}' cannot be trained on", where=where, fix="keep text parts only"
                )
        return "".join(texts)
    raise DataError(f"the content is {_kind(value)}, not text", where=where, fix="put the content in quotes")


def _train_flag(item: Mapping[str, Any], role: str, where: str) -> bool | None:
    """The per-message flag: ``train: true|false``, or OpenAI's ``weight: 0|1``."""
    value = item.get("train", item.get("weight"))
    if value is None:
        return None
    if value not in (0, 1):  # True == 1 and False == 0
        raise DataError(f"'train' is {value!r}", where=where, fix="use true or false ('weight': 1 or 0)")
    if value and role != "assistant":
        raise DataError(
            f"'train' is set on a {role} turn",
            where=where,
            fix="only assistant turns can be chosen one by one; train_on: prompt-too trains on everything",
        )
    return bool(value) if role == "assistant" else None


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.

    Templates write the arguments with ``tojson``: a string there (OpenAI's wire format) would be quoted twice.
    """
    if not isinstance(call, dict):
        raise DataError(f"a tool call is {_kind(call)}, not an object", where=where, fix="give it a name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("a tool call has no function name", where=where, fix="give it 'name' and 'arguments'")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _from_json_cell(arguments or "{}", where, f"the arguments of '{function['name']}'", always=True)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"the arguments of '{function['name']}' are {_kind(arguments)}, not an object",
            where=where,
            fix='write them as {"name": value}',
        )
    result: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        result["id"] = call["id"]
    return result


def parse_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """A row's tool schemas: a list (or its JSON text) of ``{"type": "function", "function": {...}}`` or bare functions.

    Raises:
        DataError: not a list of objects with a name.
    """
    value = _from_json_cell(value, where, "the tools")
    if not value:
        return ()
    if not isinstance(value, list):
        raise DataError(f"the tools are {_kind(value)}, not a list", where=where, fix="give a list of function schemas")
    tools = []
    for number, tool in enumerate(value, 1):
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": {key: entry for key, entry in tool.items() if key != "type"}}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or "name" not in tool["function"]:
            raise DataError(f"tool {number} has no function with a name", where=where, fix="use OpenAI's tool schema")
        tools.append(tool)
    return tuple(tools)


def _from_json_cell(value: Any, where: str, what: str, *, always: bool = False) -> Any:
    """A string that holds JSON (a CSV cell, a ShareGPT call) as data; other values as they are."""
    if not isinstance(value, str) or (not always and not value.lstrip().startswith(("[", "{"))):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} are not valid JSON: {error.msg}", where=where, fix="mend the JSON text") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _canonical(value: Any) -> str:
    # default=str: Parquet and hub rows may hold dates in the extra keys of a message.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
