"""Whether a chat template wrote all that a row says: what it leaves out without a word would never be learnt."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from veneer.data.conversation import REASONING_KEYS, Conversation, Message
from veneer.data.templates import ChatTemplate, RowRefused, TemplateFailure

_PROBE = " QWOPXZ"


def refuse_left_out(row: Conversation, template: ChatTemplate, text: str) -> None:
    """Checks that the tools and every turn of the other roles stand in the rendered conversation.

    Raises:
        RowRefused: the template ignores them (many know no tools, some no system turn or tool result).
    """
    missing = [tool["function"]["name"] for tool in row.tools if str(tool["function"]["name"]) not in text]
    if missing:
        raise RowRefused(
            f"the chat template leaves out the row's tools ({', '.join(map(str, missing))})",
            "use a chat template that knows tools, or remove the tools from the row",
        )
    for index, message in enumerate(row.messages):
        if message.role == "assistant" or not message.content.strip() or message.content.strip() in text:
            continue
        # Not there word for word: left out, or written in another way (as JSON, say)? Another content tells.
        if _same_without(row, template, index, replace(message, content=message.content + _PROBE), text):
            raise RowRefused(
                f"the chat template leaves out message {index + 1} ({message.role})",
                f"use a chat template that knows the role '{message.role}', or remove the message",
            )


def refuse_unwritten_turn(row: Conversation, template: ChatTemplate, index: int, text: str, turn: str) -> None:
    """Checks that a trained turn holds its content, its reasoning and its tool calls.

    Args:
        index: which message.
        text: the conversation rendered up to this turn.
        turn: what of ``text`` is trained, without the stop token.
    Raises:
        RowRefused: something of the message is not in it.
    """
    message, place = row.messages[index], f"turn {index + 1}"
    calls = [call["function"]["name"] for call in message.tool_calls if call["function"]["name"] not in turn]
    if calls:
        raise RowRefused(
            f"the chat template leaves out the tool call of {place} ({', '.join(calls)})",
            "use a chat template that knows tools, or remove the call from the row",
        )
    if message.content.strip() not in turn:  # "" is in every turn
        other = replace(message, content=message.content + _PROBE)
        if _same_without(row, template, index, other, text):
            raise RowRefused(f"the chat template leaves out the content of {place}", "use another chat template")
    for key in REASONING_KEYS:
        reasoning = message.extra.get(key)
        if isinstance(reasoning, str) and reasoning.strip() and reasoning.strip() not in turn:
            other = replace(message, extra={**message.extra, key: reasoning + _PROBE})
            if _same_without(row, template, index, other, text):
                raise RowRefused(
                    f"the chat template leaves out the reasoning of {place} ('{key}')",
                    f"use a chat template that knows reasoning, or remove '{key}' from the row",
                )


def texts_of(messages: Iterable[Message]) -> list[str]:
    """Every text of the messages that a template may write."""
    found = []
    for message in messages:
        found.append(message.content)
        found.extend(value for value in message.extra.values() if isinstance(value, str))
        if message.tool_calls:
            found.append(json.dumps(message.tool_calls, ensure_ascii=False, default=str))
    return found


def _same_without(row: Conversation, template: ChatTemplate, index: int, other: Message, text: str) -> bool:
    """Whether the conversation reads the same with another message at ``index``.

    ``text`` is the row rendered as a whole where that message is not the assistant's, else up to ``index``.
    """
    count = index + 1 if other.role == "assistant" else len(row.messages)
    messages = [*row.messages[:index], other, *row.messages[index + 1 : count]]
    try:
        return template.render([message.to_template() for message in messages], row.tools)[0] == text
    except TemplateFailure:
        return False
