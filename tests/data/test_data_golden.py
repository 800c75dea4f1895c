"""Golden masks: for each model family, the text of a conversation with ⟦ ⟧ around what is trained, written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_families import FAMILIES, family

from veneer.data import Conversation, Example, render, render_prompt, stop_token_ids
from veneer.data.conversation import parse_messages, parse_tools

GOLDEN = Path(__file__).parent / "golden"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, HI, HELLO = turn("system", "You are terse."), turn("user", "Hi there"), turn("assistant", "Hello!")
FRUIT, FIG = turn("user", "Name a fruit."), turn("assistant", "Fig 🍇, à la carte.")
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CONVERSATIONS = {
    "multi_turn": [SYSTEM, HI, HELLO, FRUIT, FIG],
    "no_system": [HI, HELLO, FRUIT, FIG],
    "one_turn": [HI, HELLO],
    "padded": [HI, turn("assistant", "\n  two  spaces \n")],
    "empty_turn": [HI, turn("assistant", ""), turn("user", "Well?"), HELLO],
    "chosen_turns": [HI, turn("assistant", "Wrong.", train=False), turn("user", "Again"), turn("assistant", "Right.")],
    "assistant_opens": [turn("assistant", "Welcome!"), HI, HELLO],
    "unanswered": [HI, HELLO, turn("user", "Bye")],
    "repeated": [turn("user", "Hello!"), HELLO, turn("user", "Hello!"), HELLO],
    "thinking": [
        HI,
        turn("assistant", "<think>\nA greeting.\n</think>\n\nHello!"),
        FRUIT,
        turn("assistant", "Fig.", reasoning_content="Figs are fruit."),
    ],
    "tools": [
        SYSTEM,
        turn("user", "Weather in Rome?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        turn("tool", '{"c": 21}'),
        turn("assistant", "21 degrees."),
    ],
}


def conversation(name: str) -> Conversation:
    tools = parse_tools([WEATHER] if name == "tools" else None, name)
    return Conversation(parse_messages(CONVERSATIONS[name], name), name, tools)


def cases() -> list[Any]:
    """``#### conversation train_on`` heads a case; ``#### ---`` heads a further example of the same row."""
    found = []
    for name in FAMILIES:
        parts = re.split(r"^#### (.*)\n", (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), flags=re.M)
        for head, body in zip(parts[1::2], parts[2::2]):
            if head == "---":
                found[-1][-1].append(body.removesuffix("\n"))
            else:
                found.append((name, *head.split(), [body.removesuffix("\n")]))
    return [pytest.param(*case, id="-".join(case[:3])) for case in found]


def marked(example: Example, tokenizer: Any) -> str:
    """The tokens' own characters with ⟦ ⟧ around trained stretches: what the vocabulary says, not what a decoder
    tidies.
    """
    pieces, trained = [], False
    for token, is_trained in zip(example.input_ids.tolist(), example.trained.tolist()):
        if is_trained != trained:
            pieces.append(b"\xff" if is_trained else b"\xfe")
            trained = is_trained
        pieces.append(_bytes(tokenizer, token))
    pieces.append(b"\xfe" if trained else b"")
    return b"".join(pieces).replace(b"\xff", "⟦".encode()).replace(b"\xfe", "⟧".encode()).decode()


def _bytes(tokenizer: Any, token: int) -> bytes:
    text = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.added_tokens_decoder:
        return text.encode()  # Phi-3's control tokens swallow the line break behind them: it shows in no token
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return bytes([int(text[3:5], 16)])
    if "ByteLevel" in str(type(tokenizer.backend_tokenizer.decoder)):
        return tokenizer.backend_tokenizer.decode([token]).encode() if text.isascii() else _byte_level(text)
    return text.replace("▁", " ").encode()


def _byte_level(text: str) -> bytes:
    """The byte-level alphabet backwards: printable Latin-1 stands for itself, the other bytes for 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return bytes(table[character] for character in text)


@pytest.mark.parametrize(("name", "row", "train_on", "expected"), cases())
def test_the_mask_is_the_one_written_down(name: str, row: str, train_on: Any, expected: list[str]) -> None:
    tokenizer = family(name)
    dataset = render([conversation(row)], tokenizer, max_length=None, train_on=train_on)
    assert [marked(example, tokenizer) for example in dataset] == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", ["one_turn", "no_system"])
def test_the_ids_are_those_of_transformers_own_chat_template(name: str, row: str) -> None:
    tokenizer, source = family(name), conversation(row)
    messages = [message.to_template() for message in source.messages]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, date_string="01 Jan 2026", return_dict=False)
    dataset = render([source], tokenizer, max_length=None)
    assert dataset.row(len(dataset) - 1).input_ids.tolist() == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", ["one_turn", "no_system", "padded"])
def test_a_prompt_is_what_stands_before_the_last_trained_turn(name: str, row: str) -> None:
    tokenizer = family(name)
    example = list(render([conversation(row)], tokenizer, max_length=None, train_on="last"))[-1]
    prompt = render_prompt(conversation(row), tokenizer)
    first = int(np.flatnonzero(example.trained)[0])
    assert prompt.prompt_ids == example.input_ids[:first].tolist()
    assert prompt.reference == CONVERSATIONS[row][-1]["content"]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_trained_stretch_ends_with_its_only_stop_token(name: str) -> None:
    tokenizer = family(name)
    stops = stop_token_ids(tokenizer)
    for example in render([conversation("no_system")], tokenizer, max_length=None):
        edges = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0, append=0))
        for start, end in zip(edges[::2], edges[1::2]):
            inside = [token in stops for token in example.input_ids[start:end].tolist()]
            assert inside == [False] * (end - start - 1) + [True]


@pytest.mark.parametrize("name", ["llama3", "llama31", "gemma", "mistral"])
def test_bos_stands_once_at_the_start(name: str) -> None:
    tokenizer = family(name)
    example = render([conversation("no_system")], tokenizer, max_length=None).row(0)
    assert np.flatnonzero(example.input_ids == tokenizer.bos_token_id).tolist() == [0]


def test_generation_blocks_and_prefix_rendering_give_the_same_masks() -> None:
    marked_template, plain = family("chatml_generation"), family("chatml")
    for row in ("multi_turn", "one_turn", "repeated", "empty_turn", "unanswered", "assistant_opens"):
        for train_on in ("all", "last"):
            a = render([conversation(row)], marked_template, max_length=None, train_on=train_on).row(0)
            b = render([conversation(row)], plain, max_length=None, train_on=train_on).row(0)
            assert a.input_ids.tolist() == b.input_ids.tolist()
            assert a.trained.tolist() == b.trained.tolist()


def test_a_prompt_for_a_tool_call_refers_to_the_call_as_the_template_writes_it() -> None:
    row = conversation("tools")
    call = Conversation(row.messages[:3], "call", row.tools)
    prompt = render_prompt(call, family("qwen25"))
    assert prompt.reference == '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_the_stop_token_is_the_one_that_ends_a_turn_and_eos() -> None:
    def names(family_name: str) -> set[str]:
        tokenizer = family(family_name)
        return {tokenizer.convert_ids_to_tokens(token) for token in stop_token_ids(tokenizer)}

    assert names("llama3") == {"<|eot_id|>"}
    assert names("gemma") == {"<end_of_turn>", "<eos>"}
    assert names("phi3") == {"<|end|>", "<|endoftext|>"}
    assert names("mistral") == {"</s>"}
    assert names("qwen3") == {"<|im_end|>"}
    assert names("plain") == {"<|endoftext|>"}
