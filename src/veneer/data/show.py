"""Showing what is trained: rendered rows with the trained tokens in colour, for terminals and for the report."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.data.dataset import Example, TokenDataset

if TYPE_CHECKING:
    from rich.console import RenderableType

_TRAINED_STYLE = "black on green"
_PLAIN_STYLE = "dim"
_HTML_TRAINED = "background:#b7e4c7;color:#081c15"
_HTML_PLAIN = "color:#6c757d"


def stretches(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's text, cut where training begins and ends: ``[(text, trained), ...]``, control tokens shown."""
    ids: list[int] = example.input_ids.tolist()
    edges = np.flatnonzero(np.diff(example.trained.astype(np.int8))) + 1
    cuts = [0, *edges.tolist(), len(example)]
    # Some decoders drop the space before the first token they are given: so a stretch is what it adds to all before it.
    texts = [str(tokenizer.backend_tokenizer.decode(ids[:cut], skip_special_tokens=False)) for cut in cuts]
    return [
        (texts[index + 1][len(texts[index]) :], bool(example.trained[a]))
        for index, (a, b) in enumerate(itertools.pairwise(cuts))
        if b > a
    ]


def marked_text(example: Example, tokenizer: Any) -> str:
    """The example's text with ⟦ and ⟧ around its trained stretches."""
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in stretches(example, tokenizer))


def show(dataset: TokenDataset, tokenizer: Any, n: int = 3, indices: Sequence[int] | None = None) -> RenderableType:
    """The first ``n`` examples (or those at ``indices``), trained stretches in colour, each under a line with its
    counts.

    On a terminal without colours the trained stretches stand between ⟦ and ⟧ all the same.
    """
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text

    parts: list[RenderableType] = []
    for index in indices if indices is not None else range(min(n, len(dataset))):
        example = dataset.row(index)
        trained = int(example.trained.sum())
        # A Text, not a str: rich would read the brackets of a row id as markup.
        title = Text(f"{example.row_id}: {len(example):,} tokens, {trained:,} trained")
        parts.append(Rule(title, align="left"))
        body = Text()
        for text, is_trained in stretches(example, tokenizer):
            body.append(f"⟦{text}⟧" if is_trained else text, style=_TRAINED_STYLE if is_trained else _PLAIN_STYLE)
        parts.append(body)
    parts.append(Text.assemble(("⟦ trained ⟧", _TRAINED_STYLE), ("  everything else is context", _PLAIN_STYLE)))
    return Group(*parts)


def show_html(example: Example, tokenizer: Any) -> str:
    """The same for one example as a self-contained HTML snippet: every piece of text escaped, styles inline."""
    pieces = [
        f'<span style="{_HTML_TRAINED if trained else _HTML_PLAIN}">{html.escape(text)}</span>'
        for text, trained in stretches(example, tokenizer)
    ]
    counts = f"{len(example):,} tokens, {int(example.trained.sum()):,} trained"
    return (
        f'<figure style="margin:0"><figcaption>{html.escape(example.row_id)}: {counts}</figcaption>'
        f'<pre style="white-space:pre-wrap;word-break:break-word">{"".join(pieces)}</pre></figure>'
    )
