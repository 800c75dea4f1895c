"""A conversation: what is remembered, who answers, and that nothing is read twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.data import Message
from veneer.errors import UsageError
from veneer.generate import Chat, generate
from veneer.generate import decoder as decoder_module
from veneer.models import Base, load_base


@pytest.fixture
def adapted(base: Base) -> Iterator[AdaptedModel]:
    model = attach(base, LoraConfig(r=4, lora_alpha=64, init_lora_weights=False), seed=1)
    yield model
    model.detach()


def test_a_turn_is_answered_from_the_whole_conversation(base: Base) -> None:
    chat = Chat(base, system="be short", max_new_tokens=5)
    heard: list[str] = []
    first = chat.say("one", on_text=heard.append)
    assert "".join(heard) == first.text
    chat.say("two")
    history = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "two"},
    ]
    ids = base.tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    assert generate(base, [ids], max_new_tokens=5)[0].text == chat.messages[-1].content
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2


def test_later_turns_read_only_what_was_added(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forward = decoder_module.Decoder._forward

    def counted(self: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return forward(self, ids, *rest)

    monkeypatch.setattr(decoder_module.Decoder, "_forward", counted)
    chat = Chat(base, max_new_tokens=4)
    chat.say("what is the colour of the sky")
    before = len(chat.prompt_ids([Message("user", "what is the colour of the sky")]))
    assert read[0] == before
    read.clear()
    chat.say("why")
    assert read[0] < before


def test_adapter_and_base_are_asked_apart_and_remember_apart(adapted: AdaptedModel, base: Base) -> None:
    chat = Chat(adapted, max_new_tokens=6)
    assert (chat.sides, chat.side) == (("adapter", "base"), "adapter")
    heard: dict[str, list[str]] = {"adapter": [], "base": []}
    for text in ("one two three", "four", "five"):
        before = list(chat.messages)
        ids = chat.prompt_ids([*before, Message("user", text)])
        answers = chat.compare(text, {"adapter": heard["adapter"].append, "base": heard["base"].append})
        assert answers["adapter"] == generate(adapted, [ids], max_new_tokens=6)[0]
        with adapted.disabled():
            assert answers["base"] == generate(adapted, [ids], max_new_tokens=6)[0]
        assert answers["adapter"].text != answers["base"].text
        assert chat.messages[-1].content == answers["adapter"].text
    assert "".join(heard["base"]) != "".join(heard["adapter"])
    chat.side = "base"
    ids = chat.prompt_ids([*chat.messages, Message("user", "six")])
    said = chat.say("six")
    with adapted.disabled():
        assert said == generate(adapted, [ids], max_new_tokens=6)[0]


def test_a_base_has_one_side(base: Base) -> None:
    chat = Chat(base)
    assert chat.sides == ("base",)
    with pytest.raises(UsageError, match="no 'adapter' to talk to"):
        chat.side = "adapter"


def test_undo_and_reset_forget(base: Base) -> None:
    chat = Chat(base, max_new_tokens=3)
    assert not chat.undo()
    chat.say("one")
    kept = list(chat.messages)
    chat.say("two")
    assert chat.undo()
    assert chat.messages == kept
    chat.reset()
    assert chat.messages == []


def test_a_turn_that_is_too_long_is_refused_and_not_remembered(base: Base) -> None:
    chat = Chat(base, max_new_tokens=3)
    chat.say("one")
    kept = list(chat.messages)
    with pytest.raises(UsageError, match="positions"):
        chat.say("zz " * 600)
    assert chat.messages == kept
    chat.say("two")


def test_turns_that_draw_do_not_draw_alike(base: Base) -> None:
    chat = Chat(base, max_new_tokens=8, temperature=2.0, seed=4)
    first, second = chat.say("one"), chat.say("one")
    again = Chat(base, max_new_tokens=8, temperature=2.0, seed=4)
    assert (again.say("one"), again.say("one")) == (first, second)
    assert first.token_ids != second.token_ids


def test_a_base_without_a_chat_template_cannot_be_talked_to(make_tiny_base: Callable[..., Any]) -> None:
    bare = load_base(make_tiny_base(), dtype="float32", device="cpu")
    template, bare.tokenizer.chat_template = bare.tokenizer.chat_template, None
    with pytest.raises(UsageError, match="no chat template"):
        Chat(bare)
    assert Chat(bare, chat_template=template, max_new_tokens=2).say("one").prompt_tokens > 5
