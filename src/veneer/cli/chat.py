"""``veneer chat``: talk to a base or a run, with the adapter on, off, or both side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from veneer.cli.options import (
    AllowBaseMismatch,
    Base,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from veneer.errors import VeneerError, did_you_mean

if TYPE_CHECKING:
    from veneer.cli.speaker import Sampling, Speaker
    from veneer.data import Message

Voice = Literal["adapter", "base"]

HELP = {
    "/base": "answer with the adapter off",
    "/adapter": "answer with the adapter on",
    "/both": "answer with both, side by side",
    "/system TEXT": "set the system message and begin anew; without TEXT there is none",
    "/single": "answer each message by itself, or again with what was said before",
    "/reset": "forget the conversation",
    "/save FILE": "add the conversation to FILE as a row that can be trained on",
    "/help": "this list",
    "/quit": "leave (Ctrl-D too)",
}


def chat(
    model: Model,
    system: Annotated[
        str | None,
        typer.Option(help="The system message; empty: none.", show_default="the one the run was trained with"),
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    base: Base = None,
    allow_base_mismatch: AllowBaseMismatch = False,
) -> None:
    """Talk to a model. /base, /adapter and /both switch the adapter; /help lists the commands."""
    from veneer.cli.output import say
    from veneer.cli.speaker import Sampling, open_speaker

    speaker = open_speaker(model, dtype=dtype, device=device, base=base, allow_base_mismatch=allow_base_mismatch)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        what = "base and adapter" if speaker.has_adapter else "base"
        say(f"{model} ({what}). /help lists the commands, /quit leaves.")
    if system is None and speaker.system:
        system = speaker.system
        say(f"system message of the run: {system} (/system changes it)")
    if speaker.single_turn:
        say("the run was trained on single answers, so each message is answered by itself (/single changes that)")
    room = Room(speaker, Sampling(max_new_tokens, temperature, top_p, top_k, seed), system)
    for line in _lines(on_terminal, room.prompt):
        if not room.hear(line):
            return


def _lines(on_terminal: bool, prompt: Callable[[], str]) -> Iterator[str]:
    """What the user types, or the lines of a pipe."""
    if not on_terminal:
        yield from sys.stdin
        return
    import readline  # noqa: F401  # input() then has history and editing

    while True:
        try:
            yield input(prompt())
        except EOFError:
            print()
            return


class Room:
    """The conversation. Adapter and base each remember their own answers once both have been asked."""

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str | None) -> None:
        from veneer.generate import Memory

        self.speaker, self.sampling, self.system = speaker, sampling, system or None
        self.single = speaker.single_turn
        self.voices: tuple[Voice, ...] = ("adapter",) if speaker.has_adapter else ("base",)
        self.histories: dict[Voice, list[Message]] = {voice: [] for voice in self.voices}
        # One each: the keys and values of the past differ with the adapter.
        self._memories: dict[Voice, Memory] = {"adapter": Memory(), "base": Memory()}

    def prompt(self) -> str:
        """What stands before the user's line: who is going to answer."""
        return f"[{'+'.join(self.voices)}] > " if self.speaker.has_adapter else "> "

    def hear(self, line: str) -> bool:
        """One line of the user's: a command or a message. Returns False when the user leaves."""
        text = line.strip()
        if not text:
            return True
        try:
            return self._command(text) if text.startswith("/") else self._answer(text)
        except VeneerError as error:
            from veneer.cli.guard import print_problem

            print_problem(error)
            return True

    def _command(self, text: str) -> bool:
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word in ("/base", "/adapter", "/both"):
            self._switch(word)
        elif word == "/system":
            self.system = rest or None
            self._forget()
            print(
                "the conversation begins anew, " + ("with this system message" if rest else "without a system message")
            )
        elif word == "/single":
            self.single = not self.single
            self._forget()
            print("each message is answered by itself" if self.single else "answers know what was said before")
        elif word == "/reset":
            self._forget()
            print("the conversation begins anew")
        elif word == "/save":
            self._save(rest)
        elif word == "/help":
            for name, what in HELP.items():
                print(f"  {name:<14} {what}")
        else:
            hint = did_you_mean(word, (name.partition(" ")[0] for name in HELP)) or "/help lists the commands."
            print(f"there is no {word}. {hint}")
        return True

    def _switch(self, word: str) -> None:
        if not self.speaker.has_adapter:
            print("this model has no adapter")
            return
        # Whoever joins goes on from what was said so far.
        said = self.histories[self.voices[-1]]
        self.voices = ("base", "adapter") if word == "/both" else ("base",) if word == "/base" else ("adapter",)
        self.histories = {voice: list(self.histories.get(voice, said)) for voice in self.voices}
        print({"/base": "adapter off", "/adapter": "adapter on", "/both": "both, side by side"}[word])

    def _answer(self, text: str) -> bool:
        from veneer.data import Message

        user = Message("user", text)
        if self.single:
            self._forget()
        try:
            answers = {voice: self._ask(voice, user, stream=len(self.voices) == 1) for voice in self.voices}
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)")
            return True
        if len(answers) > 1:
            self._side_by_side(answers)
        for voice, answer in answers.items():
            self.histories[voice] += [user, Message("assistant", answer)]
        return True

    def _ask(self, voice: Voice, user: Message, *, stream: bool) -> str:
        from veneer.data import Conversation, Message

        first = (Message("system", self.system),) if self.system else ()
        history = self.histories[voice]
        # A first message can be put to a base without a chat template, too.
        kind: Literal["chat", "prompt-completion"] = "chat" if history or first else "prompt-completion"
        # render_prompt cuts before the last assistant turn; an empty one says that it is this answer that is wanted.
        asked = Conversation((*first, *history, user, Message("assistant", "")), "chat", kind=kind)

        def write(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        prompt = self.speaker.render(asked)
        (found,) = self.speaker.answer(
            [prompt],
            self.sampling,
            adapter=voice == "adapter",
            on_text=write if stream else None,
            memory=self._memories[voice],
        )
        if stream:
            print("" if found.finish_reason == "stop" else " [cut at --max-new-tokens]", flush=True)
        return found.text

    def _side_by_side(self, answers: dict[Voice, str]) -> None:
        from rich.table import Table
        from rich.text import Text

        from veneer.cli.output import console

        table = Table(expand=True)
        for voice in answers:
            table.add_column(voice, ratio=1, overflow="fold")
        table.add_row(*(Text(answer) for answer in answers.values()))
        console().print(table)

    def _forget(self) -> None:
        self.histories = {voice: [] for voice in self.voices}

    def _save(self, name: str) -> None:
        from veneer.data import Message
        from veneer.files import storage_errors

        if not name:
            print("say where: /save FILE")
            return
        said = self.histories[self.voices[-1]]
        if not said:
            print("nothing has been said yet")
            return
        messages = [*([Message("system", self.system)] if self.system else []), *said]
        row = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
        try:
            with storage_errors(name), open(name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise VeneerError(f"the file cannot be written: {error.strerror}", where=name) from error
        print(f"added to {name}")
