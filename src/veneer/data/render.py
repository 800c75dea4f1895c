"""Rows to token ids and loss mask, built together in one pass, with an account of everything cut or left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from veneer.data.conversation import Conversation, Rows
from veneer.data.dataset import Example, RenderStats, TokenDataset
from veneer.data.encode import Encoder
from veneer.data.spans import (
    Document,
    TrainOn,
    chat_documents,
    control_tokens_in,
    plain_document,
    runs_together,
    text_document,
)
from veneer.data.templates import ChatTemplate, RowRefused, any_of, special_tokens
from veneer.errors import DataError, UsageError, did_you_mean

Overlong = Literal["truncate", "drop", "error"]

NOTHING_TO_TRAIN = "nothing to train on"
CUT_AWAY = "the trained part lies beyond max_length"
TOO_LONG = "longer than max_length"

_CHUNK = 512  # rows tokenised at a time: bounds the memory that offsets take


@dataclass
class RowResult:
    """What became of one row: its examples (none where nothing is trained), or why it was refused."""

    row_id: str
    examples: list[Example] = field(default_factory=list)
    refused: RowRefused | None = None
    empty_turns: int = 0
    control_tokens: bool = False
    unprompted: bool = False  # a generation block marks a turn that the template's own prompt does not lead up to


def render(
    rows: Rows | Sequence[Conversation],
    tokenizer: Any,
    *,
    max_length: int | None,
    train_on: TrainOn = "all",
    overlong: Overlong = "truncate",
    chat_template: str | Path | None = None,
) -> TokenDataset:
    """Token ids and loss mask of every row.

    Args:
        rows: what :func:`veneer.data.read` returned.
        tokenizer: a transformers tokenizer with character offsets (a fast one).
        max_length: the most tokens an example may have; None for no limit.
        train_on: "all" assistant turns, only the "last", or "prompt-too" for every token of the row. A message's own
            ``train`` flag goes before this. Raw text is trained on as a whole.
        overlong: what happens to a row of more tokens: "truncate" keeps its start, "drop" leaves it out, "error" stops.
        chat_template: a Jinja file, a template's name or its text, in place of the tokenizer's own.
    Returns:
        The examples in the order of their rows; ``stats`` says what was cut, dropped or split, and ``stats.warnings``
        in words.
    Raises:
        UsageError: ``max_length`` below 1, an unknown ``train_on`` or ``overlong``.
        DataError: rows that cannot be masked exactly (they are counted and named), or no row left to train on.
    """
    check_options(max_length, train_on, overlong)
    conversations = rows.conversations if isinstance(rows, Rows) else list(rows)
    if not conversations:
        raise DataError("there are no rows to render", fix="give a data file with at least one row")
    stats = RenderStats(rows=len(conversations))
    renderer = Renderer(tokenizer, train_on, chat_template)
    examples: list[Example] = []
    refused: list[RowResult] = []
    control: list[str] = []
    unprompted: list[str] = []
    for result in renderer.results(conversations):
        if result.refused is not None:
            refused.append(result)
            continue
        stats.empty_turns += result.empty_turns
        if result.control_tokens:
            control.append(result.row_id)
        if result.unprompted:
            unprompted.append(result.row_id)
        if not result.examples:
            stats.dropped.setdefault(NOTHING_TO_TRAIN, []).append(result.row_id)
            continue
        stats.split_rows += len(result.examples) > 1
        _keep(result, max_length, overlong, stats, examples)
    if refused:
        raise _refusal(refused, len(conversations))
    if overlong == "error" and stats.dropped.get(TOO_LONG):
        raise _too_long(stats.dropped[TOO_LONG], max_length)
    if not examples:
        raise _nothing_left(stats, max_length)
    stats.examples = len(examples)
    stats.tokens = sum(len(example) for example in examples)
    stats.trained_tokens = sum(int(example.trained.sum()) for example in examples)
    stats.warnings = _warnings(stats, control, renderer, max_length)
    if unprompted:
        stats.warnings.append(
            "the template's generation prompt is not how it begins the answers that its {% generation %} blocks mark, "
            "so the model is trained on other beginnings than it will be given: "
            f"{_rows(len(unprompted))} ({named(unprompted)})"
        )
    glued = [row.row_id for row in conversations if renderer.template is None and runs_together(row)]
    if glued:
        stats.warnings.append(
            "there is no chat template, so prompt and completion are joined as they stand: "
            f"no white space between them in {_rows(len(glued))} ({named(glued)})"
        )
    return TokenDataset.from_examples(examples, stats)


def check_options(max_length: int | None, train_on: str, overlong: str) -> None:
    """Raises UsageError for options that mean nothing."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise UsageError(
            f"max_length is {max_length}",
            where="train.max_length",
            fix="use a number of tokens of 1 or more, such as 1024",
        )
    for name, value, known in (("train_on", train_on, get_args(TrainOn)), ("overlong", overlong, get_args(Overlong))):
        if value not in known:
            fix = did_you_mean(str(value), known) or f"use one of {', '.join(known)}"
            raise UsageError(f"unknown {name} '{value}'", where=f"data.{name}", fix=fix)


class Renderer:
    """Holds the template and the encoder for a pass over rows; the template is only asked for when a row needs it."""

    def __init__(self, tokenizer: Any, train_on: TrainOn = "all", chat_template: str | Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.encoder = Encoder(tokenizer)
        has_template = chat_template is not None or bool(tokenizer.chat_template)
        self.template = ChatTemplate(tokenizer, chat_template) if has_template else None
        self._compared = False
        control = special_tokens(tokenizer)
        self._control = re.compile(any_of(control)) if control else re.compile("(?!)")

    def results(self, conversations: Sequence[Conversation]) -> Iterator[RowResult]:
        """One result per row, in order.

        Raises:
            DataError: something that holds for every row, such as a missing chat template.
        """
        for start in range(0, len(conversations), _CHUNK):
            yield from self._chunk(conversations[start : start + _CHUNK])

    def _chunk(self, conversations: Sequence[Conversation]) -> list[RowResult]:
        results, documents, owners = [], [], []
        for row in conversations:
            result = RowResult(row.row_id, control_tokens=control_tokens_in(row, self._control))
            result.empty_turns = sum(m.role == "assistant" and m.is_empty and not m.train for m in row.messages)
            try:
                mine = self._documents(row)
            except RowRefused as refusal:
                result.refused, mine = refusal, []
            result.unprompted = any(not span.prompted for document in mine for span in document.spans)
            documents.extend(mine)
            owners.extend([result] * len(mine))
            results.append(result)
        for result, encoded in zip(owners, self.encoder.encode(documents) if documents else []):
            if isinstance(encoded, RowRefused):
                result.refused = encoded
            elif encoded.trained.any():
                result.examples.append(encoded)
        return results

    def _documents(self, row: Conversation) -> list[Document]:
        if row.text is not None:
            return [text_document(row)] if row.text.strip() else []
        if self.template is not None:
            documents = chat_documents(row, self.template, self.train_on)
            if documents and not self._compared:
                self.template.check_against_tokenizer(row)
                self._compared = True
            return documents
        if row.kind != "prompt-completion":
            ChatTemplate(self.tokenizer)  # raises: there is none
        if self.tokenizer.eos_token_id is None:
            raise RowRefused(
                "the tokenizer has no eos token to end the answer with", "set one, or use another tokenizer"
            )
        if row.messages[-1].is_empty and self.train_on != "prompt-too":
            return []
        return [plain_document(row, self.train_on, self.tokenizer.eos_token_id, self.tokenizer.eos_token)]


def _keep(
    result: RowResult, max_length: int | None, overlong: Overlong, stats: RenderStats, examples: list[Example]
) -> None:
    """Adds a row's examples, cut to ``max_length`` as asked, and counts what that costs."""
    cut = 0
    kept: list[Example] = []
    for example in result.examples:
        if max_length is None or len(example) <= max_length:
            kept.append(example)
            continue
        if overlong != "truncate":
            stats.dropped.setdefault(TOO_LONG, []).append(example.row_id)
            continue
        cut += 1
        stats.truncated_tokens += len(example) - max_length
        stats.truncated_trained_tokens += int(example.trained[max_length:].sum())
        if not example.trained[:max_length].any():
            stats.dropped.setdefault(CUT_AWAY, []).append(example.row_id)
            continue
        kept.append(Example(example.input_ids[:max_length], example.trained[:max_length], example.row_id))
    stats.truncated_rows += bool(cut)
    examples.extend(kept)


def named(row_ids: Sequence[str], most: int = 5) -> str:
    """The first few row ids, and how many more there are."""
    more = f" and {len(row_ids) - most:,} more" if len(row_ids) > most else ""
    return ", ".join(row_ids[:most]) + more


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _refusal(refused: list[RowResult], total: int) -> DataError:
    first = refused[0].refused
    assert first is not None
    others = [result for result in refused if result.refused is not None and result.refused.reason != first.reason]
    also = f"; also: {others[0].refused.reason}" if others and others[0].refused else ""
    return DataError(
        f"{_rows(len(refused))} of {total:,} cannot be rendered with an exact mask: {first.reason}{also}",
        where=named([result.row_id for result in refused]),
        fix=first.fix,
    )


def _too_long(row_ids: list[str], max_length: int | None) -> DataError:
    return DataError(
        f"{_rows(len(row_ids))} longer than max_length {max_length}",
        where=named(row_ids),
        fix="raise max_length, or choose overlong: truncate or drop",
    )


def _nothing_left(stats: RenderStats, max_length: int | None) -> DataError:
    reasons = "; ".join(f"{_rows(len(ids))}: {reason}" for reason, ids in stats.dropped.items())
    ids = [row_id for ids in stats.dropped.values() for row_id in ids]
    length = any(reason in stats.dropped for reason in (CUT_AWAY, TOO_LONG))
    return DataError(
        f"no row is left to train on ({reasons})",
        where=named(ids),
        fix=f"raise max_length (now {max_length}) or shorten the prompts"
        if length
        else "give each row an assistant turn with text in it, and check the 'train' flags",
    )


def _warnings(stats: RenderStats, control: list[str], renderer: Renderer, max_length: int | None) -> list[str]:
    """The account in sentences, worst first."""
    said = []
    for reason, ids in stats.dropped.items():
        said.append(f"left out {_rows(len(ids))} ({reason}): {named(ids)}")
    if stats.truncated_rows:
        whole = stats.tokens + stats.truncated_tokens
        said.append(
            f"truncated {_rows(stats.truncated_rows)} of {stats.rows:,} to max_length {max_length}: "
            f"{stats.truncated_tokens:,} tokens lost ({stats.truncated_tokens / whole:.1%} of all), "
            f"{stats.truncated_trained_tokens:,} of them trained ones with the stop token at their end"
        )
    if stats.split_rows:
        said.append(
            f"the chat template renders earlier turns differently once later turns follow: {_rows(stats.split_rows)} "
            "became several examples, one for each such turn as the model will have to write it "
            "(train_on: last keeps one per row)"
        )
    if stats.empty_turns:
        said.append(f"{stats.empty_turns:,} empty assistant turns are not trained on")
    if control:
        said.append(f"{_rows(len(control))} with control tokens of the tokenizer in the text: {named(control)}")
    if renderer.template is not None and renderer.template.writes_date:
        said.append(
            "the chat template writes today's date; training always writes 1 January 2026, "
            "so that a run is the same every day"
        )
    return said
