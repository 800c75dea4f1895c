"""Labelled rows to token ids: the tokenizer's own frame around a text or a pair, cut with an exact account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from veneer.data.conversation import Rows
from veneer.data.dataset import Int64, RenderStats, TokenDataset
from veneer.data.labelled import class_id, labelled
from veneer.data.render import TOO_LONG, Overlong, check_options, named
from veneer.errors import DataError

EMPTY = "no text"
NO_CLASS = -1  # of a row that is only to be predicted


@dataclass
class LabelledDataset(TokenDataset):
    """Rendered rows with the class of each; no token is trained on by itself (``trained`` is False throughout)."""

    classes: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows] ids, -1 without a label
    token_types: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))  # [N] 0, and 1 in the second text


def render_labelled(
    rows: Rows,
    tokenizer: Any,
    names: Sequence[str],
    *,
    max_length: int | None,
    overlong: Overlong = "truncate",
    pad_id: int | None = None,
) -> LabelledDataset:
    """Token ids and class of every row.

    A text gets the tokenizer's own special tokens (``[CLS] text [SEP]``); two texts too, or a line break between them
    where the tokenizer has no separator.

    Args:
        names: of the classes, in the order of their ids.
        max_length: the most tokens of a row, special ones counted; None for no limit.
        overlong: "truncate" cuts the texts and keeps the frame, the longer of two texts first; "drop" leaves the row
            out, "error" stops.
        pad_id: a token that rows must not end with: decoders that pool the last token that is no padding would take
            the one before it.
    Returns:
        The rows in their order; ``stats`` says what was cut or left out.
    Raises:
        DataError: no row is left, a row is too long under "error", or ``max_length`` leaves no room for text.
    """
    check_options(max_length, "all", overlong)
    found = labelled(rows)
    stats = RenderStats(rows=len(found))
    separated = tokenizer.sep_token_id is not None
    kept: list[tuple[str, list[int], list[int], int]] = []
    for row in found:
        text, pair = row.text or "", row.pair
        if not (text.strip() or (pair or "").strip()):
            stats.dropped.setdefault(EMPTY, []).append(row.row_id)
            continue
        texts = [text] if pair is None else [text, pair] if separated else [f"{text}\n{pair}"]
        ids, types = _encode(tokenizer, texts, None)
        if max_length is not None and len(ids) > max_length:
            if overlong != "truncate":
                stats.dropped.setdefault(TOO_LONG, []).append(row.row_id)
                continue
            if tokenizer.num_special_tokens_to_add(pair=len(texts) > 1) >= max_length:
                raise DataError(
                    f"max_length {max_length} leaves no room for text between the special tokens",
                    where=row.row_id,
                    fix="raise train.max_length",
                )
            whole = len(ids)
            ids, types = _encode(tokenizer, texts, max_length)
            stats.truncated_rows += 1
            stats.truncated_tokens += whole - len(ids)
        while ids and ids[-1] == pad_id:
            ids, types = ids[:-1], types[:-1]
        if not ids:
            stats.dropped.setdefault(EMPTY, []).append(row.row_id)
            continue
        known = NO_CLASS if row.label is None else class_id(row.label, names)
        if known is None:
            raise DataError(
                f"the label '{row.label}' is none of the classes ({named(names, 12)})",
                where=row.row_id,
                fix="mend the row, or take it out",
            )
        kept.append((row.row_id, ids, types, known))
    if overlong == "error" and stats.dropped.get(TOO_LONG):
        ids_of = stats.dropped[TOO_LONG]
        raise DataError(
            f"{len(ids_of):,} rows longer than max_length {max_length}",
            where=named(ids_of),
            fix="raise train.max_length, or choose overlong: truncate or drop",
        )
    if not kept:
        reasons = "; ".join(f"{len(ids):,}: {reason}" for reason, ids in stats.dropped.items())
        raise DataError(
            f"no row is left ({reasons})", where=rows.source, fix="give rows with text, or raise max_length"
        )
    stats.examples, stats.tokens = len(kept), sum(len(ids) for _, ids, _, _ in kept)
    stats.warnings = _warnings(stats, max_length)
    lengths = np.array([len(ids) for _, ids, _, _ in kept], np.int64)
    return LabelledDataset(
        input_ids=np.concatenate([np.array(ids, np.int32) for _, ids, _, _ in kept]),
        trained=np.zeros(stats.tokens, np.bool_),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        row_ids=[row_id for row_id, _, _, _ in kept],
        stats=stats,
        classes=np.array([known for _, _, _, known in kept], np.int64),
        token_types=np.concatenate([np.array(types, np.int64) for _, _, types, _ in kept]),
    )


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> tuple[list[int], list[int]]:
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = tokenizer(*texts, return_token_type_ids=True, verbose=False, **cut)
    return list(encoded["input_ids"]), list(encoded["token_type_ids"])


def _warnings(stats: RenderStats, max_length: int | None) -> list[str]:
    said = [f"left out {len(ids):,} rows ({reason}): {named(ids)}" for reason, ids in stats.dropped.items()]
    if stats.truncated_rows:
        whole = stats.tokens + stats.truncated_tokens
        said.append(
            f"truncated {stats.truncated_rows:,} of {stats.rows:,} rows to max_length {max_length}: "
            f"{stats.truncated_tokens:,} tokens lost ({stats.truncated_tokens / whole:.1%} of all)"
        )
    return said
