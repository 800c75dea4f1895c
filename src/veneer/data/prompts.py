"""Prompts for generation and evaluation, rendered by the same code that rendered the training rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.conversation import Conversation
from veneer.data.encode import Encoder
from veneer.data.spans import turn_text
from veneer.data.templates import ChatTemplate, RowRefused, TemplateFailure
from veneer.errors import DataError


@dataclass(frozen=True)
class PromptExample:
    """What the model is given, and what the row says it should answer ("" where the row has no answer)."""

    prompt_ids: list[int]
    reference: str
    row_id: str
    conversation: Conversation


def render_prompt(conversation: Conversation, tokenizer: Any, chat_template: str | Path | None = None) -> PromptExample:
    """Everything before the conversation's last assistant turn, with the template's generation prompt.

    These ids are the ones that stand before that turn's first trained token in :func:`veneer.data.render`. A
    conversation without an assistant turn is a prompt as a whole.

    Raises:
        DataError: a raw-text row, which has no prompt; a row that the template refuses; no chat template.
    """
    if conversation.text is not None:
        raise DataError(
            "a raw-text row has no prompt",
            where=conversation.row_id,
            fix="give rows with a prompt and an answer, or measure perplexity",
        )
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    reference = messages[last].content if last < len(messages) else ""
    if chat_template is None and not tokenizer.chat_template and conversation.kind == "prompt-completion":
        encoder = Encoder(tokenizer)
        text = messages[0].content
        ids = [*encoder.first_ids, *encoder.backend.encode(text, add_special_tokens=False).ids]
    else:
        template = ChatTemplate(tokenizer, chat_template)
        text = _chat_prompt(conversation, template, last)
        if last < len(messages) and messages[last].tool_calls:
            reference = _called(conversation, template, last)
        ids = list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    if not ids:
        raise DataError("the prompt is empty", where=conversation.row_id, fix="give the row a prompt")
    return PromptExample(ids, reference, conversation.row_id, conversation)


def _chat_prompt(conversation: Conversation, template: ChatTemplate, last: int) -> str:
    try:
        if last > 0:
            return template.render_row(conversation, last, prompt=True)[0]
        # The row begins with the assistant: its prompt is what the template writes before a first turn.
        text, opening = template.render_row(conversation, 1)[0], template.generation_prompt
        if opening and opening in text:
            return text[: text.index(opening) + len(opening)]
        raise TemplateFailure("the row begins with an assistant turn, and the template has no mark that opens one")
    except TemplateFailure as error:
        raise DataError(
            f"the chat template refuses this row: {error}",
            where=conversation.row_id,
            fix="change the row's roles or order, or use another chat template",
        ) from error


def _called(conversation: Conversation, template: ChatTemplate, turn: int) -> str:
    """A tool call as the model has to write it, which is not in the message's content."""
    try:
        return turn_text(conversation, template, turn).strip()
    except RowRefused as refusal:
        raise DataError(refusal.reason, where=conversation.row_id, fix=refusal.fix) from refusal


def stop_token_ids(tokenizer: Any, chat_template: str | Path | None = None) -> set[int]:
    """The tokens that end an assistant turn under this template, plus eos (eos alone where there is no template).

    Raises:
        DataError: the template ends turns without a stop token, or there is neither a template nor an eos.
    """
    stops = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    if chat_template is not None or tokenizer.chat_template:
        stops.update(end.token_id for end in ChatTemplate(tokenizer, chat_template).turn_ends)
    if not stops:
        raise DataError("the tokenizer has neither a chat template nor an eos token", fix="use another tokenizer")
    return stops
