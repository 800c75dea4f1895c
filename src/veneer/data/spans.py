"""From a conversation to text with the trained spans known by character: the place where masks are made.

No answer is ever searched for in the text. A turn's span begins where the template's own prompt for it ends, and ends
with the stop token that the template writes; both come out of rendering prefixes of the conversation, two renderings
per trained turn.

Templates may render an earlier turn differently once later turns follow it (Qwen3 takes ``<think>`` out of history,
gpt-oss changes ``<|return|>`` to ``<|end|>``). The model will be asked to write the turn as it is rendered *last*, so
such a turn is trained in a document of its own, which ends with it, and not in the document where it is history.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from veneer.data.conversation import Conversation
from veneer.data.faithful import refuse_left_out, refuse_unwritten_turn, texts_of
from veneer.data.templates import MARK_CLOSE, MARK_OPEN, ChatTemplate, RowRefused, TemplateFailure

TrainOn = Literal["all", "last", "prompt-too"]


# A text and the character spans of its {% generation %} blocks.
_Rendered = tuple[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class Span:
    """Characters ``[start, stop)`` are the assistant's text, ``[stop, end)`` its stop token (empty: eos is appended
    by id).
    """

    start: int
    stop: int
    end: int
    stop_id: int
    prompted: bool = True  # the template's own prompt for the turn ends before ``start``


@dataclass(frozen=True)
class Document:
    """A text to tokenise once, and what is trained in it.

    ``everything`` trains the whole text but for ``spans`` (which are then the turns to leave out). ``own_specials``
    adds the tokenizer's own first tokens (bos) and an eos at the end: texts that no chat template has framed.
    """

    text: str
    spans: tuple[Span, ...]
    row_id: str
    everything: bool = False
    own_specials: bool = False


def trained_turns(row: Conversation, train_on: TrainOn) -> list[int]:
    """Indices of the messages to train on: its own flag decides, else ``train_on``; empty turns only on request."""
    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    chosen = []
    for index in turns:
        flag = row.messages[index].train
        wanted = (train_on != "last" or index == turns[-1]) and not row.messages[index].is_empty
        if wanted if flag is None else flag:
            chosen.append(index)
    return chosen


def runs_together(row: Conversation) -> bool:
    """Whether a prompt and its completion would be joined without white space, as words are when a template is
    missing.
    """
    if row.kind != "prompt-completion":
        return False
    prompt, completion = (message.content for message in row.messages)
    return bool(prompt and completion) and not (prompt[-1].isspace() or completion[0].isspace())


def text_document(row: Conversation) -> Document:
    """A raw-text row: everything is trained."""
    assert row.text is not None
    return Document(row.text, (), row.row_id, everything=True, own_specials=True)


def plain_document(row: Conversation, train_on: TrainOn, eos_id: int, eos: str) -> Document:
    """A prompt and a completion, one after the other, for a tokenizer without a chat template.

    Raises:
        RowRefused: the completion holds the stop token in its text.
    """
    prompt, completion = (message.content for message in row.messages)
    completion = completion.removesuffix(eos)  # many data sets carry the eos already; it is added once, below
    if eos in completion:
        raise RowRefused(f"the completion has the stop token {eos!r} in its text", "remove it from the row")
    text = prompt + completion
    span = Span(len(prompt), len(text), len(text), eos_id)
    if train_on == "prompt-too":
        return Document(text, (), row.row_id, everything=True, own_specials=True)
    return Document(text, (span,), row.row_id, own_specials=True)


def chat_documents(row: Conversation, template: ChatTemplate, train_on: TrainOn) -> list[Document]:
    """The documents that train a conversation: one, or several where the template rewrites history; none without
    trained turns.

    Raises:
        RowRefused: the template refuses the row, or does not let the mask be known exactly.
    """
    if template.has_generation and any(MARK_OPEN in text or MARK_CLOSE in text for text in texts_of(row.messages)):
        raise RowRefused("the text holds the noncharacters U+FDD0 or U+FDD1", "remove them")
    if train_on == "prompt-too":
        left_out = [
            i for i, message in enumerate(row.messages) if message.role == "assistant" and message.train is False
        ]
        full = _render(template, row, None)
        text = full[0]
        refuse_left_out(row, template, text)
        spans = [_turn(template, row, index, full) for index in left_out]
        if any(not _same_start(text, prefix, span) for prefix, span in spans):
            raise RowRefused(
                "a turn with train: false is rendered differently once later turns follow it",
                "use train_on: all, or remove the turn",
            )
        return [Document(text, tuple(span for _, span in spans), row.row_id, everything=True)]
    chosen = trained_turns(row, train_on)
    if not chosen:
        return []
    _refuse_stop_tokens_in_text(row, template, chosen)
    full = _render(template, row, None)
    refuse_left_out(row, template, full[0])
    waiting = [_turn(template, row, index, full) for index in chosen]
    for index, (text, span) in zip(chosen, waiting):
        refuse_unwritten_turn(row, template, index, text, text[span.start : span.stop])
    texts_and_spans: list[tuple[str, tuple[Span, ...]]] = []
    text = full[0]
    while waiting:
        fitting = [(prefix, span) for prefix, span in waiting if _same_start(text, prefix, span)]
        if fitting:
            texts_and_spans.append((text, tuple(span for _, span in fitting)))
            waiting = [turn for turn in waiting if turn not in fitting]
        if waiting:
            text = waiting[-1][0]
    texts_and_spans.reverse()
    count = len(texts_and_spans)
    names = [row.row_id] if count == 1 else [f"{row.row_id}[{number}/{count}]" for number in range(1, count + 1)]
    return [Document(text, spans, name) for name, (text, spans) in zip(names, texts_and_spans)]


def turn_text(row: Conversation, template: ChatTemplate, index: int) -> str:
    """What the model has to write for turn ``index``, without the stop token, as the template renders it.

    Raises:
        RowRefused: the template refuses the row, or does not let the turn's border be known.
    """
    rendered = _render(template, row, index + 1)
    text, span = rendered[0], _span(template, row, index, rendered)
    return text[span.start : span.stop]


def _same_start(text: str, prefix: str, span: Span) -> bool:
    """Whether ``text`` begins just as the rendering that ends with this turn: then the turn may be trained in
    ``text``.
    """
    return text.startswith(prefix[: span.end])


def _render(template: ChatTemplate, row: Conversation, count: int | None, *, prompt: bool = False) -> _Rendered:
    try:
        return template.render_row(row, count, prompt=prompt)
    except TemplateFailure as error:
        raise RowRefused(
            f"the chat template refuses this row: {error}",
            "change the row's roles or order, or use another chat template",
        ) from error


def _turn(template: ChatTemplate, row: Conversation, index: int, full: _Rendered) -> tuple[str, Span]:
    """The conversation rendered up to turn ``index``, and the turn's span in that text."""
    rendered = full if index == len(row.messages) - 1 else _render(template, row, index + 1)
    return rendered[0], _span(template, row, index, rendered)


def _span(template: ChatTemplate, row: Conversation, index: int, rendered: _Rendered) -> Span:
    """The span of turn ``index`` in a rendering that ends with it."""
    text = rendered[0]
    start, block_end, prompted = _start(template, row, index, rendered)
    ends = {end.token: end.token_id for end in template.turn_ends}
    match = template.stop_pattern.search(text, start)
    place = f"turn {index + 1}"
    if match is None:
        raise RowRefused(
            f"the chat template writes no stop token ({' or '.join(map(repr, ends))}) after {place}",
            "use a chat template that ends every assistant turn with its stop token",
        )
    if text[block_end : match.start()].strip():
        raise RowRefused(
            f"the template's generation block for {place} does not reach the stop token: "
            f"{_snippet(text[block_end : match.start()])} stands between them",
            "use a chat template whose {% generation %} block ends with the turn",
        )
    # After the stop token a template writes white space, and may close the text with special tokens (Phi-3: an eos).
    rest = template.special_pattern.sub("", text[match.end() :])
    if rest.strip():
        raise RowRefused(
            f"the chat template writes more after the stop token of {place}: {_snippet(rest)}",
            "use a chat template that ends the turn with its stop token",
        )
    return Span(start, match.start(), match.end(), ends[match.group()], prompted)


def _start(template: ChatTemplate, row: Conversation, index: int, rendered: _Rendered) -> tuple[int, int, bool]:
    """Where turn ``index``, the last one rendered, begins; where its generation block ends (the text's end without such
    blocks); and whether the template's own prompt leads up to it.
    """
    text, blocks = rendered
    opened, blocks_before = _prompt_end(template, row, index, text)
    if template.has_generation:
        if len(blocks) <= blocks_before:
            raise RowRefused(
                f"the chat template has {{% generation %}} blocks, and renders none for turn {index + 1}",
                "mend the template, or use one without these blocks",
            )
        start, end = blocks[-1]
        # A block may begin before the prompt's end (Qwen's line break after "assistant"): the model is given that part.
        return (start if opened is None else max(start, opened)), end, opened is not None
    if opened is not None:
        return opened, len(text), True
    if index == 0:
        raise RowRefused(
            "the row begins with an assistant turn, and the template has no mark that opens one",
            "begin the row with a user turn",
        )
    prompt, _ = _render(template, row, index, prompt=True)
    same = next((i for i, (a, b) in enumerate(zip(prompt, text)) if a != b), min(len(prompt), len(text)))
    raise RowRefused(
        f"the chat template prompts for turn {index + 1} with {_snippet(prompt[same:])}, "
        f"and renders that turn with {_snippet(text[same:])} there",
        "give a chat template with {% generation %} blocks, or one whose turns begin with its generation prompt",
    )


def _prompt_end(template: ChatTemplate, row: Conversation, index: int, text: str) -> tuple[int | None, int]:
    """Where the template's prompt for turn ``index`` ends in ``text`` (None where the text does not begin with it), and
    how many generation blocks stand before.
    """
    if index > 0:
        prompt, blocks = _render(template, row, index, prompt=True)
        return (len(prompt) if text.startswith(prompt) else None), len(blocks)
    # No prefix to render: the first thing the template writes to open a turn is this turn's opening.
    opening = template.generation_prompt
    found = text.find(opening) if opening else -1
    return (found + len(opening) if found >= 0 else None), 0


def _refuse_stop_tokens_in_text(row: Conversation, template: ChatTemplate, chosen: Iterable[int]) -> None:
    stops = {end.token for end in template.turn_ends}
    if template.tokenizer.eos_token:
        stops.add(template.tokenizer.eos_token)
    for index in chosen:
        text = "\0".join(texts_of([row.messages[index]]))
        found = next((stop for stop in sorted(stops) if stop in text), None)
        if found is not None:
            raise RowRefused(
                f"message {index + 1} has the stop token {found!r} in its text",
                "remove it from the row: the chat template adds it once",
            )


def control_tokens_in(row: Conversation, pattern: re.Pattern[str]) -> bool:
    """Whether any text of the row holds a control token of the tokenizer."""
    texts = [row.text] if row.text is not None else texts_of(row.messages)
    return any(pattern.search(text) for text in texts)


def _snippet(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "...") if text else "nothing"
