"""``veneer generate``: answers to prompts, from the command line, stdin or a file of rows."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from veneer.cli.options import (
    AllowBaseMismatch,
    Base,
    BatchSize,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Quiet,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.cli.speaker import Speaker


@dataclass(frozen=True)
class _Question:
    row_id: str
    shown: str
    prompt_ids: list[int]
    reference: str | None = None


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Without any: one a line from stdin.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows whose last answer is to be given: a file or a hub id.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only so many rows of --data.")] = None,
    system: Annotated[
        str | None,
        typer.Option(help="A system message before each prompt; empty: none.", show_default="the run's own"),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the text as it is, without a chat template.")] = False,
    compare: Annotated[bool, typer.Option("--both", help="Answer with the adapter off, too.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    base: Base = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts; a classifier's run names the class of each text, with its probability."""
    from veneer.cli.classify import predict_classes, prediction_document, print_predictions
    from veneer.cli.output import print_json, say, stdout_reserved
    from veneer.cli.progress import Counter
    from veneer.cli.speaker import Sampling, open_speaker
    from veneer.run import is_classifier, load_classifier

    if data is not None and (prompts or system or raw):
        raise UsageError("--data brings prompts of its own", where="--data", fix="leave PROMPT, --system and --raw out")
    if raw and system:
        raise UsageError("--raw has no place for a system message", where="--raw", fix="leave one of them out")
    texts = prompts or ([] if data is not None else [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if data is None and not texts:
        raise UsageError(
            "there is no prompt", where="PROMPT", fix="give one in quotes, one a line on stdin, or --data FILE"
        )
    if is_classifier(model):
        for option, given in {"--system": system, "--raw": raw, "--both": compare, "--stop": stop}.items():
            if given:
                raise UsageError("a classifier writes no text", where=option, fix="leave it out")
        with stdout_reserved(json):
            where: dict[str, Any] = {
                "dtype": dtype,
                "device": device,
                "base": base,
                "allow_base_mismatch": allow_base_mismatch,
            }
            load = functools.partial(load_classifier, model, **where)
            labels = predict_classes(load, model, texts, data, max_rows=max_rows, batch_size=batch_size)
        if json:
            print_json({"model": model, "answers": prediction_document(labels)})
        else:
            print_predictions(labels)
        return
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()), batch_size)
    with stdout_reserved(json):
        speaker = open_speaker(model, dtype=dtype, device=device, base=base, allow_base_mismatch=allow_base_mismatch)
        if compare and not speaker.has_adapter:
            raise UsageError("there is no adapter to turn off", where=model, fix="leave --both out, or give a run")
        if system is None and speaker.system and not raw and data is None:
            system = speaker.system
            say(f"system message of the run: {system}")
        questions = _of_data(speaker, data, max_rows) if data else _of_texts(speaker, texts, system, raw)
        ids = [question.prompt_ids for question in questions]
        counter = Counter(quiet=quiet or len(questions) == 1)
        found = speaker.answer(ids, sampling, progress=lambda done, total: counter("answers", done, total))
        without = speaker.answer(ids, sampling, adapter=False) if compare else None
    if json:
        answers = []
        for index, (question, generation) in enumerate(zip(questions, found)):
            answer: dict[str, object] = {
                "row_id": question.row_id,
                "prompt": question.shown,
                "text": generation.text,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "new_tokens": len(generation.token_ids),
            }
            if question.reference is not None:
                answer["reference"] = question.reference
            if without is not None:
                answer["base_text"] = without[index].text
            answers.append(answer)
        print_json({"model": model, "answers": answers})
        return
    for index, (question, generation) in enumerate(zip(questions, found)):
        if len(questions) > 1:
            print(("\n" if index else "") + f"> {question.shown}")
        if without is None:
            print(generation.text)
        else:
            print(f"base:    {without[index].text}\nadapter: {generation.text}")


def _of_texts(speaker: Speaker, texts: list[str], system: str | None, raw: bool) -> list[_Question]:
    from veneer.data import Conversation, Message

    questions = []
    for number, text in enumerate(texts, start=1):
        if raw:
            ids = speaker.encode(text)
        else:
            before = (Message("system", system),) if system else ()
            # A lone prompt can be answered by a base without a chat template, too.
            kind: Literal["chat", "prompt-completion"] = "chat" if system else "prompt-completion"
            ids = speaker.render(Conversation((*before, Message("user", text)), f"prompt {number}", kind=kind))
        questions.append(_Question(f"prompt {number}", text, ids))
    return questions


def _of_data(speaker: Speaker, data: str, max_rows: int | None) -> list[_Question]:
    from veneer.data import render_prompt
    from veneer.data.read import read

    questions = []
    for conversation in read(data, limit=max_rows).conversations:
        example = render_prompt(conversation, speaker.base.tokenizer, speaker.chat_template)
        shown = next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")
        questions.append(_Question(example.row_id, shown, example.prompt_ids, example.reference))
    return questions
