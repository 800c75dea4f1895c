"""Batched generation. What a row gets does not depend on its neighbours, on their number, or on the order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel
from veneer.adapters.mixed import is_mixed
from veneer.data import stop_token_ids as turn_ends
from veneer.errors import DataError, UsageError
from veneer.generate.decoder import Decoder, Memory, inference
from veneer.generate.sampling import Sampling, choose, row_noise
from veneer.generate.text import TextSoFar
from veneer.generate.whole import WholeDecoder, open_decoder
from veneer.models import Base

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt."""

    token_ids: list[int]  # as generated, without the stop token; a stop string's tokens are among them
    text: str  # without special tokens; ends before a stop string
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class _Row:
    """One prompt on its way."""

    number: int
    prompt: list[int]
    limit: int  # most new tokens
    noise: Tensor | None  # [limit] float64
    text: TextSoFar | None  # where stop strings or a listener need the text as it comes
    ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None


def generate(
    model: Base | AdaptedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_token_ids: Iterable[int] | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory: Memory | None = None,
) -> list[Generation]:
    """Continues every prompt.

    Args:
        model: a base, or a base with adapters as they are switched now.
        prompts: token ids, with the generation prompt of the chat template where there is one.
        max_new_tokens: at most so many per row, and never past the model's positions.
        temperature: 0 takes the most likely token; else tokens are drawn.
        top_p: draw from the smallest set of tokens with this share of the probability.
        top_k: draw from this many tokens at most; 0 is no limit.
        stop_token_ids: ids that end a row; None is those that end a turn under the tokenizer's chat template, and eos.
        stop: strings that end a row; the text is cut before them.
        seed: with a row's number, all that chance depends on.
        batch_size: rows at once.
        on_text: gets the text of a single prompt as it comes, whole characters only.
        progress: called with the number of rows done, and of all.
        memory: of a single prompt's past, for a prompt that goes on where an earlier one ended.

    Returns:
        one :class:`Generation` per prompt, in their order.

    Raises:
        UsageError: a value out of range, an empty prompt, one longer than the model's positions, or an unknown id.
    """
    module, tokenizer = _parts(model)
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    if max_new_tokens < 1 or batch_size < 1:
        raise UsageError(
            f"max_new_tokens is {max_new_tokens} and batch_size is {batch_size}", fix="both must be 1 or more"
        )
    if len(prompts) != 1 and (on_text or memory):
        raise UsageError(f"on_text and memory are for one prompt, not {len(prompts)}", fix="give one prompt at a time")
    if isinstance(stop, str):
        stop = (stop,)
    if not all(stop):
        raise UsageError("a stop string is empty", where="stop", fix="leave it out")
    limits = _limits(module, prompts, max_new_tokens)
    added = tokenizer.get_added_vocab()
    ends = default_stop_ids(module, tokenizer) if stop_token_ids is None else set(stop_token_ids)
    ends |= {added[text] for text in stop if text in added}  # a special token never shows in the text

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    rows = [
        _Row(
            number=number,
            prompt=list(prompt),
            limit=limits[number],
            noise=row_noise(seed, number, limits[number]) if temperature else None,
            text=TextSoFar(decode, stop) if stop or on_text else None,
        )
        for number, prompt in enumerate(prompts)
    ]
    done = 0
    with inference(module):
        decoder = open_decoder(module) if rows else None
        equal = decoder is not None and not decoder.attention_only
        for batch in _batches(rows, batch_size, _most_columns(module), equal=equal):
            assert decoder is not None
            for row in _run(decoder, batch, ends, sampling, memory):
                if on_text and row.text and (new := row.text.fresh(last=row.reason is not None)):
                    on_text(new)
                if row.reason is not None:
                    done += 1
                    if progress:
                        progress(done, len(rows))
    results = []
    for row in rows:
        assert row.reason is not None
        text = row.text.text if row.text else decode(row.ids)
        results.append(Generation(row.ids, text, row.reason, len(row.prompt)))
    return results


def default_stop_ids(module: nn.Module, tokenizer: Any) -> set[int]:
    """The ids that end a turn: by the chat template, the tokenizer's eos, and the model's generation config."""
    configured = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found.append(tokenizer.eos_token_id)
    # Without a template, or with one that has no stop token, what is found so far ends a row, or the limit does.
    with contextlib.suppress(DataError):
        found += turn_ends(tokenizer)
    return {int(stop) for stop in found if stop is not None}


def _run(
    decoder: Decoder | WholeDecoder, batch: list[_Row], ends: set[int], sampling: Sampling, memory: Memory | None
) -> Iterator[_Row]:
    """Runs a batch to its end; yields a row whenever it has got a token or is done."""
    logits = decoder.read([row.prompt for row in batch], max(row.limit for row in batch), memory)
    active = list(batch)
    while True:
        noise = None
        if sampling.temperature:
            noise = torch.stack([row.noise[len(row.ids)] for row in active if row.noise is not None])
        tokens = choose(logits, sampling, noise)
        for row, token in zip(active, tokens.tolist()):
            _take(row, token, ends)
            yield row
        left = [place for place, row in enumerate(active) if row.reason is None]
        if not left:
            break
        if len(left) < len(active):
            left = _fill_gaps(left, len(active))
            decoder.keep(left)
            active = [active[place] for place in left]
            tokens = tokens[torch.tensor(left, device=tokens.device)]
        logits = decoder.step(tokens)
    if memory is not None:
        memory.put(batch[0].prompt + batch[0].ids, decoder.cache)


def _take(row: _Row, token: int, ends: set[int]) -> None:
    if token in ends:
        row.reason = "stop"
        return
    row.ids.append(token)
    if row.text is not None and row.text.push(token):
        row.reason = "stop"
    elif len(row.ids) >= row.limit:
        row.reason = "length"


def _fill_gaps(left: list[int], count: int) -> list[int]:
    """The rows that are left, in an order that moves few of them: gaps at the front are filled from the end."""
    size = len(left)
    kept = set(left)
    from_end = [place for place in reversed(range(size, count)) if place in kept]
    return [place if place in kept else from_end.pop(0) for place in range(size)]


def _most_columns(module: nn.Module) -> float:
    """How many tokens a batch may be wide, padding counted: a mask that the model keeps (GPT-Neo's) has no more."""
    positions = _positions(module)
    squares = (buffer for buffer in module.buffers() if buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2])
    return positions if any(square.shape[-1] == positions for square in squares) else math.inf


def _batches(rows: list[_Row], size: int, columns: float, *, equal: bool) -> Iterator[list[_Row]]:
    """Rows of similar length together, longest first: what does not fit in memory fails at once.

    A row's own tokens always fit into ``columns``; beside a longer prompt its last ones may not.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.prompt), row.number))
    batch: list[_Row] = []
    for row in ordered:
        first = batch[0] if batch else row
        is_other = equal and len(row.prompt) != len(first.prompt)
        if len(batch) == size or is_other or len(first.prompt) + row.limit > columns:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _parts(model: Base | AdaptedModel) -> tuple[nn.Module, Any]:
    base = model.base if isinstance(model, AdaptedModel) else model
    tokenizer = getattr(base, "tokenizer", None)
    if tokenizer is None:
        raise UsageError(
            "the model has no tokenizer to write text with", fix="attach the adapter to what load_base returns"
        )
    if is_mixed(model.module):
        raise UsageError(
            "rows are put together anew while they are generated, and cannot be mixed by their number",
            where="AdaptedModel.mixed",
            fix="call model.module.generate(...) within it, or generate for one adapter after the other",
        )
    return model.module, tokenizer


def _limits(module: nn.Module, prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """How many tokens each row may get; checks the prompts on the way."""
    positions = _positions(module)
    vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # a transformers model has it
    limits = []
    for number, prompt in enumerate(prompts):
        where = f"prompt {number + 1} of {len(prompts)}"
        if not len(prompt):
            raise UsageError("the prompt is empty", where=where, fix="give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UsageError(
                f"the prompt holds ids outside 0 to {vocabulary - 1}", where=where, fix="use the base's own tokenizer"
            )
        if len(prompt) >= positions:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the model {positions} positions",
                where=where,
                fix="shorten the prompt",
            )
        limits.append(min(most, positions - len(prompt)))
    return limits


def _positions(module: nn.Module) -> int:
    config: Any = module.config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**62
