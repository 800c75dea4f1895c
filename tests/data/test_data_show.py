"""What is trained, made visible: in a terminal and in the report."""

from __future__ import annotations

import io
import re

import pytest
from data_families import FAMILIES, family
from rich.console import Console

from veneer.data import read, render, show, show_html
from veneer.data.show import marked_text, stretches

ROWS = read([{"prompt": "Hi there", "completion": "Hello <b>🍇</b> & [red]more[/red]"}])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stretches_are_the_whole_text_in_order(name: str) -> None:
    tokenizer = family(name)
    example = render(ROWS, tokenizer, max_length=None).row(0)
    pieces = stretches(example, tokenizer)
    assert "".join(text for text, _ in pieces) == tokenizer.decode(example.input_ids)
    assert "Hello <b>🍇</b> & [red]more[/red]" in next(text for text, trained in pieces if trained)


def test_a_stretch_keeps_the_space_that_a_decoder_would_drop() -> None:
    tokenizer = family("mistral")
    assert "[/INST]⟦ Hello" in marked_text(render(ROWS, tokenizer, max_length=None).row(0), tokenizer)


def test_a_terminal_shows_the_trained_part_in_colour_and_the_row_by_name() -> None:
    tokenizer = family("chatml")
    dataset = render(ROWS, tokenizer, max_length=None)
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=200).print(show(dataset, tokenizer, 1))
    text = out.getvalue()
    assert re.search(r"\x1b\[[0-9;]*42m⟦Hello <b>🍇</b> & \[red\]more\[/red\]<\|im_end\|>⟧\x1b\[0m", text)
    assert f"row:1: {len(dataset.row(0))} tokens, {int(dataset.row(0).trained.sum())} trained" in text


def test_a_row_id_with_brackets_is_shown_as_it_is() -> None:
    rows = read([{"messages": [
        {"role": role, "content": f"<think>\na\n</think>\n\n{n}" if role == "assistant" else "Hi"}
        for n in range(2) for role in ("user", "assistant")
    ]}])  # fmt: skip
    dataset = render(rows, family("qwen3"), max_length=None)
    out = io.StringIO()
    Console(file=out, width=200).print(show(dataset, family("qwen3"), 2))
    assert "row:1[1/2]: " in out.getvalue()
    assert "row:1[2/2]: " in out.getvalue()


def test_a_log_without_colours_shows_the_same_marks() -> None:
    tokenizer = family("chatml")
    out = io.StringIO()
    Console(file=out, width=200).print(show(render(ROWS, tokenizer, max_length=None), tokenizer, 3))
    assert "\x1b" not in out.getvalue()
    assert "⟦Hello <b>🍇</b> & [red]more[/red]<|im_end|>⟧" in out.getvalue()


def test_html_is_escaped_and_marks_the_trained_part() -> None:
    tokenizer = family("chatml")
    snippet = show_html(render(ROWS, tokenizer, max_length=None).row(0), tokenizer)
    assert "Hello &lt;b&gt;🍇&lt;/b&gt; &amp; [red]more[/red]&lt;|im_end|&gt;</span>" in snippet
    assert snippet.count("background:") == 1
    assert not re.search(r"<(?!/?(figure|figcaption|pre|span)\b)", snippet)
