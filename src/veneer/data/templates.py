"""Chat templates: compiling one, rendering messages to text, and what a template does at the end of an assistant
turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from veneer.data.conversation import Conversation
from veneer.errors import DataError, did_you_mean

# Some templates (Llama 3.x) write today's date into the system prompt. Then a run that is resumed tomorrow would
# train on other tokens than the same run today, so rendering for training always writes this date.
TEMPLATE_DATE = datetime(2026, 1, 1)

# Noncharacters (Unicode 23.7: never in interchanged text) put around {% generation %} blocks while rendering.
# Marks inside the text survive macros and captured blocks, where counting the characters written so far goes wrong.
MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{MARK_OPEN}{MARK_CLOSE}]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "QWOPXZ"


class _Generation(jinja2.ext.Extension):
    """The ``{% generation %}`` block of transformers' templates: what the assistant itself generates."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{MARK_OPEN}{caller()}{MARK_CLOSE}"


class _Namespace(jinja2.utils.Namespace):
    """Templates come with models, from anyone: a namespace must not become a way to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set the attribute {name!r}")
        super().__setitem__(name, value)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a short way for what templates ask for most: a key of a message, a fact of a loop."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``; what is not plain data or a loop's own counter goes the sandbox's way."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_METHODS:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is jinja2.runtime.LoopContext and attribute in _LOOP_FACTS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


_DICT_METHODS = frozenset(dir(dict))
_LOOP_FACTS = frozenset({"first", "last", "index", "index0", "length", "previtem", "nextitem"})


def _namespace(*args: Any, **attributes: Any) -> _Namespace:
    if args or any(name.startswith("_") for name in attributes):
        raise jinja2.exceptions.SecurityError("a chat template may only name public attributes of a namespace")
    return _Namespace(**attributes)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, in the key order of the data, as transformers gives it to templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, namespace=_namespace)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: {error.message}",
            where=f"chat template, line {error.lineno}",
            fix="mend the template, or give another one as data.chat_template",
        ) from error


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends an assistant turn: the stop token's text and id, and what it writes after it."""

    token: str
    token_id: int


class TemplateFailure(Exception):
    """The template refused these messages (its own ``raise_exception``, or an undefined value)."""


class RowRefused(Exception):
    """This row cannot be rendered with a right mask. ``fix`` says what to do about it."""

    def __init__(self, reason: str, fix: str) -> None:
        self.reason, self.fix = reason, fix
        super().__init__(reason)


class ChatTemplate:
    """A chat template bound to a tokenizer's special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        override: None for the tokenizer's own template; else a path to a Jinja file, the name of one of the tokenizer's
            templates, or the template itself.
    Raises:
        DataError: there is no template, or it is not valid Jinja.
    """

    def __init__(self, tokenizer: Any, override: str | Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = resolve_template(tokenizer, override)
        self.has_generation = bool(_GENERATION.search(self.source))
        self.writes_date = "strftime_now" in self.source
        self._compiled = _compile(self.source)
        self._tokens = {str(key): value for key, value in tokenizer.special_tokens_map.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
        date: datetime = TEMPLATE_DATE,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of ``messages``, and the character spans of its ``{% generation %}`` blocks (none without them).

        Raises:
            TemplateFailure: the template refused the messages.
        """
        try:
            return self._render(self._as_read(messages), tools, add_generation_prompt, date)
        except Exception as error:  # a template is a program: what it raises is up to the row
            raise TemplateFailure(str(error) or type(error).__name__) from error

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether it reads a message's content as a list of parts alone, as those of many vision-language models do."""
        return not self._writes(_PROBE) and self._writes(_in_parts(_PROBE))

    def _writes(self, content: Any) -> bool:
        try:
            return _PROBE in self._render([{"role": "user", "content": content}], (), False, TEMPLATE_DATE)[0]
        except Exception:  # as in render
            return False

    def _as_read(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages in the form that this template reads."""
        if not self.takes_parts:
            return list(messages)
        return [{**message, "content": _in_parts(message["content"])} for message in messages]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        date: datetime,
    ) -> tuple[str, list[tuple[int, int]]]:
        marked = self._compiled.render(
            messages=messages,
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=date.strftime,
            **self._tokens,
        )
        return _unmark(marked) if self.has_generation else (marked, [])

    def render_row(
        self, row: Conversation, count: int | None = None, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """:meth:`render` for the row's first ``count`` messages, with the generation prompt if ``prompt``."""
        messages = row.template_messages[:count]
        return self.render(messages, row.tools, add_generation_prompt=prompt)

    def check_against_tokenizer(self, row: Conversation) -> None:
        """Compares this rendering of ``row`` with transformers' own, which is what the model gets when it is served.

        Raises:
            DataError: they differ, so a model would be trained on other text than it will see.
        """
        messages = row.template_messages
        for _attempt in range(2):  # a template may write today's date, and midnight may fall between the two
            ours = self.render(messages, row.tools, date=datetime.now())[0]
            theirs = self.tokenizer.apply_chat_template(
                self._as_read(messages), tools=list(row.tools) or None, chat_template=self.source, tokenize=False
            )
            if ours == theirs:
                return
        raise DataError(
            "this version of transformers renders the chat template differently than Veneer does",
            where=row.row_id,
            fix="install the transformers version of constraints.txt, or report this template",
        )

    @functools.cached_property
    def turn_end(self) -> TurnEnd:
        """The stop token that this template writes after an assistant's answer.

        Raises:
            DataError: it writes none that the tokenizer knows as one token: a model trained so would never stop.
        """
        return self._find_end([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}])

    @functools.cached_property
    def tool_turn_end(self) -> TurnEnd:
        """The stop token after a tool call, which some families end differently (gpt-oss: ``<|call|>``)."""
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": _PROBE}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return self._find_end([{"role": "user", "content": "Hello"}, turn], self.turn_end)
        except DataError:
            return self.turn_end  # the template knows no tools

    @functools.cached_property
    def turn_ends(self) -> tuple[TurnEnd, ...]:
        """Every token that ends a turn under this template, each once."""
        return tuple(dict.fromkeys((self.turn_end, self.tool_turn_end)))

    @functools.cached_property
    def stop_pattern(self) -> re.Pattern[str]:
        """Matches any token that ends a turn."""
        return re.compile(any_of(end.token for end in self.turn_ends))

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any control token of the tokenizer (nothing where it has none)."""
        return re.compile(any_of(special_tokens(self.tokenizer)) or "(?!)")

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template writes to open an assistant turn, after a user's turn ("" where it writes nothing)."""
        user = [{"role": "user", "content": "Hello"}]
        closed, opened = self.render(user)[0], self.render(user, add_generation_prompt=True)[0]
        return opened[len(closed) :] if opened.startswith(closed) else ""

    def _find_end(self, messages: list[dict[str, Any]], usual: TurnEnd | None = None) -> TurnEnd:
        try:
            text, _ = self.render(messages)
        except TemplateFailure as error:
            raise DataError(
                f"the chat template refuses a plain question and answer: {error}",
                where="chat template",
                fix="give another template as data.chat_template",
            ) from error
        _, found, tail = text.rpartition(_PROBE)
        if usual is not None and usual.token in tail:
            return usual
        special = special_tokens(self.tokenizer)
        matches = list(re.finditer(any_of(special), tail)) if found and special else []
        # After an answer the first control token ends the turn (Phi-3 goes on with an eos). After a tool call it may
        # belong to the call (Gemma 4 quotes with <|"|>): there it is the last.
        match = None if not matches else matches[0] if usual is None else matches[-1]
        if match is not None and usual is not None and tail[match.end() :].strip():
            match = None
        if match is None:
            raise DataError(
                "the chat template ends an assistant turn without a stop token: the model would never learn to stop"
                if not tail.strip()
                else f"the chat template ends an assistant turn with {tail.strip()!r}, "
                "which is no special token of this tokenizer",
                where="chat template",
                fix=f"give a template as data.chat_template that ends turns with {self.tokenizer.eos_token!r}",
            )
        return TurnEnd(match.group(), special[match.group()])


def resolve_template(tokenizer: Any, override: str | Path | None = None) -> str:
    """The source of the template to use.

    Raises:
        DataError: there is none, or ``override`` names a file or template that is not there.
    """
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if override is None:
        if "default" in named or len(named) == 1:
            return named.get("default") or next(iter(named.values()))
        raise DataError(
            "the tokenizer has no chat template" if not named else "the tokenizer has several templates and no default",
            where=str(getattr(tokenizer, "name_or_path", "") or "tokenizer"),
            fix="use an instruction-tuned base, or give a Jinja file as data.chat_template",
        )
    text = str(override)
    if "{%" in text or "{{" in text:
        return text
    if text in named:
        return named[text]
    path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"there is no chat template '{text}': no such file, and no template of the tokenizer has this name",
            where="data.chat_template",
            fix=did_you_mean(text, named) or "give the path of a Jinja file",
        ) from error


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The control tokens of a tokenizer, text to id: the added tokens marked special, and eos and its like."""
    found = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token in tokenizer.all_special_tokens:
        index = tokenizer.convert_tokens_to_ids(token)
        if index is not None and index >= 0:
            found[str(token)] = int(index)
    return found


def any_of(tokens: Iterable[str]) -> str:
    """A pattern that matches any of the tokens."""
    # Longest first: a token may begin with another one.
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _in_parts(text: str) -> list[dict[str, str]]:
    """A text as the only part of a message that may hold images too."""
    return [{"type": "text", "text": text}]


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Takes the marks out of a rendered text and says where they were; blocks that touch are one."""
    spans: list[tuple[int, int]] = []
    pieces: list[str] = []
    position, start = 0, 0
    for index, piece in enumerate(_MARKS.split(marked)):
        # Pieces alternate: outside, inside, outside, ... (blocks do not nest).
        if index % 2 == 0:
            start = position + len(piece)
        elif spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + len(piece))
        else:
            spans.append((start, start + len(piece)))
        pieces.append(piece)
        position += len(piece)
    return "".join(pieces), spans
