"""A conversation with a model, with and without its adapter. No terminal here: a caller prints what it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from veneer.adapters import AdaptedModel
from veneer.data import Conversation, Message, render_prompt
from veneer.data import stop_token_ids as turn_ends
from veneer.errors import UsageError
from veneer.generate.decoder import Memory
from veneer.generate.generate import Generation, default_stop_ids, generate
from veneer.models import Base

Side = Literal["adapter", "base"]
OnText = Callable[[str], None]


class Chat:
    """A conversation that remembers its turns.

    Args:
        model: a base, or a base with adapters; with adapters, both sides can be asked.
        system: the system message, or None for the template's own.
        chat_template: a template instead of the tokenizer's.
        options: of :func:`veneer.generate.generate`: max_new_tokens, temperature, top_p, top_k, stop, seed.

    Raises:
        UsageError: the model has no chat template.
    """

    def __init__(
        self,
        model: Base | AdaptedModel,
        *,
        system: str | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        base: Any = model.base if isinstance(model, AdaptedModel) else model
        self._tokenizer: Any = getattr(base, "tokenizer", None)
        if self._tokenizer is None or not (chat_template or self._tokenizer.chat_template):
            raise UsageError(
                "the model has no chat template to talk through",
                fix="use an instruction-tuned base, or give a chat template",
            )
        self.model = model
        self.system = system
        self.messages: list[Message] = []
        self._template = chat_template
        self._side: Side = "adapter" if isinstance(model, AdaptedModel) else "base"
        # What a side has read of the conversation; by the names of the adapters too, which others may switch.
        self._memories: dict[tuple[str, ...], Memory] = {}
        stops = default_stop_ids(model.module, self._tokenizer)
        if chat_template is not None:
            stops |= turn_ends(self._tokenizer, chat_template)
        self.options: dict[str, Any] = {"max_new_tokens": 512, "seed": 0, "stop_token_ids": stops, **options}

    @property
    def sides(self) -> tuple[Side, ...]:
        """Who can be asked."""
        return ("adapter", "base") if isinstance(self.model, AdaptedModel) else ("base",)

    @property
    def side(self) -> Side:
        """Who answers."""
        return self._side

    @side.setter
    def side(self, side: Side) -> None:
        if side not in self.sides:
            raise UsageError(f"there is no '{side}' to talk to here", fix=f"use {' or '.join(self.sides)}")
        self._side = side

    def say(self, text: str, on_text: OnText | None = None) -> Generation:
        """Says ``text`` and gets an answer; both are remembered.

        Args:
            text: the user's turn.
            on_text: gets the answer's text as it comes.

        Raises:
            UsageError: the conversation has become too long for the model; nothing is remembered then.
            DataError: the template does not take this conversation.
        """
        messages = [*self.messages, Message("user", text)]
        answer = self._answer(messages, self._side, on_text)
        self.messages = [*messages, Message("assistant", answer.text)]
        return answer

    def compare(self, text: str, on_text: Mapping[Side, OnText] | None = None) -> dict[Side, Generation]:
        """Says ``text`` to every side, one after the other; the conversation goes on with the answer of ``side``.

        Args:
            text: the user's turn.
            on_text: by side, gets its answer's text as it comes.
        """
        messages = [*self.messages, Message("user", text)]
        answers = {side: self._answer(messages, side, (on_text or {}).get(side)) for side in self.sides}
        self.messages = [*messages, Message("assistant", answers[self._side].text)]
        return answers

    def undo(self) -> bool:
        """Forgets the last turn and its answer; False when there is none."""
        self.messages, before = self.messages[:-2], len(self.messages)
        return before > 0

    def reset(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.messages = []

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation up to where the next answer begins, as training rendered them.

        Raises:
            DataError: the template does not take these messages.
        """
        system = (Message("system", self.system),) if self.system is not None else ()
        # What is rendered ends before the last assistant turn: an empty one marks the answer that is wanted.
        wanted = Conversation((*system, *messages, Message("assistant", "")), "the conversation")
        return render_prompt(wanted, self._tokenizer, self._template).prompt_ids

    def _answer(self, messages: Sequence[Message], side: Side, on_text: OnText | None) -> Generation:
        off: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        names: tuple[str, ...] = ()
        if isinstance(self.model, AdaptedModel):
            if side == "base":
                off = self.model.disabled()
            else:
                names = self.model.active_names
        memory = self._memories.setdefault((side, *names), Memory())
        options = {**self.options, "seed": self.options["seed"] + len(messages)}  # no turn draws like another
        with off:
            return generate(self.model, [self.prompt_ids(messages)], on_text=on_text, memory=memory, **options)[0]
