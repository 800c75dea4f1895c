"""``evaluate``: a model, held-out rows and metrics; answers are generated, and base and adapter share one load."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath
from typing import Any

from torch import nn

from veneer.adapters import AdaptedModel
from veneer.data import Conversation, Rows, collate_padded, render, render_prompt, stop_token_ids
from veneer.data.read import Source, read
from veneer.errors import DataError, ModelError, UsageError, VeneerError
from veneer.evaluate.bootstrap import (
    CONFIDENCE,
    LARGEST_EXPONENT,
    RESAMPLES,
    PairedEstimate,
    bootstrap_mean,
    bootstrap_perplexity,
)
from veneer.evaluate.evaluation import Evaluation, MetricResult, RowResult
from veneer.evaluate.metrics import Metric, resolve_metrics, score
from veneer.generate import Generation, generate
from veneer.models import Base
from veneer.models.head import answer_logprobs

PERPLEXITY = "perplexity"
BATCH_TOKENS = 8192  # padded tokens of one forward for the perplexity

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: "adapter: answers" with rows done of rows, and so on for every part."""


@dataclasses.dataclass(frozen=True)
class _Question:
    """A row, ready to be asked."""

    conversation: Conversation
    prompt: str
    reference: str
    prompt_ids: list[int]  # empty where no text is generated


@dataclasses.dataclass(frozen=True)
class _Likelihood:
    """The reference answer's summed negative log-likelihood (nats) over its tokens."""

    nll: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Answers:
    """What one model (adapter on, or off) said to all questions; None for what was not asked or does not fit."""

    generations: list[Generation | None]
    likelihoods: list[_Likelihood | None]


def evaluate(
    model: Base | AdaptedModel | str | PathLike[str],
    data: Rows | Source,
    *,
    metrics: Sequence[str],
    max_new_tokens: int = 256,
    max_rows: int | None = None,
    batch_size: int = 64,
    compare: bool = True,
    chat_template: str | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """Measures a model on held-out rows; with an adapter also its base, in the same load of the weights.

    Answers are decoded greedily from each row's prompt (everything before its last assistant turn) under the model's
    chat template. The perplexity is of the reference's tokens and the stop token after them, given that prompt.

    Args:
        model: a loaded model, or a run folder, an adapter folder or a base to load.
        data: rows, or what ``veneer.data.read`` takes.
        metrics: names of :data:`veneer.evaluate.METRICS`, or ``regex:PATTERN``; the first is the headline.
        max_new_tokens: where an answer is cut; a base that never stops costs no more than this.
        max_rows: measure a sample of so many rows, drawn with ``seed``, in the data's order.
        batch_size: prompts generated at once.
        compare: with an adapter, measure the base too.
        chat_template: another template than the model's (a run folder brings its recipe's).
        progress: called as ``progress(what, done, total)``.
        seed: of the sample of rows and of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        UsageError: an unknown metric, a number out of range, a model without a tokenizer.
        DataError: no rows, a row without an answer, or a reference that a metric cannot use.
        ModelError: a log-likelihood that is not finite.
    """
    chosen = resolve_metrics(metrics)
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("max_rows", max_rows)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}", where=name, fix="choose a larger number")
    started = time.perf_counter()
    rows = _sample(data if isinstance(data, Rows) else read(data), max_rows, seed)
    spec = ""
    if not isinstance(model, Base | AdaptedModel):
        spec = fspath(model)
        chat_template = chat_template or _template_of_run(spec)
        model = _load(spec)
    base = _base_of(model)
    tell = progress or _silent
    texts = any(metric.score is not None for metric in chosen)
    questions = _questions(rows, base, chosen, chat_template)

    def ask(who: str) -> _Answers:
        with _eval_mode(base.module):
            generations: list[Generation | None] = [None] * len(questions)
            if texts:
                generations = [
                    *generate(
                        model,
                        [question.prompt_ids for question in questions],
                        max_new_tokens=max_new_tokens,
                        temperature=0.0,
                        stop_token_ids=stop_token_ids(base.tokenizer, chat_template),
                        batch_size=batch_size,
                        progress=lambda done, total: tell(f"{who}: answers", done, total),
                    )
                ]
            likelihoods: list[_Likelihood | None] = [None] * len(questions)
            if _wants_perplexity(chosen):
                likelihoods = _likelihoods(base, rows, chat_template, lambda d, t: tell(f"{who}: perplexity", d, t))
        return _Answers(generations, likelihoods)

    adapted = isinstance(model, AdaptedModel)
    answers = ask("adapter" if adapted else "base")
    base_answers = None
    if isinstance(model, AdaptedModel) and compare:
        with model.disabled():
            base_answers = ask("base")

    results = _rows(chosen, questions, answers, base_answers)
    return Evaluation(
        metrics=_aggregate(chosen, results, seed, resamples),
        rows=results,
        model=spec or base.spec,
        base=base.identity.to_dict(),
        data_source=rows.source,
        data_hash=rows.content_hash,
        max_new_tokens=max_new_tokens,
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=seed,
        seconds=time.perf_counter() - started,
        too_long=sum(item is None for item in answers.likelihoods) if _wants_perplexity(chosen) else 0,
    )


def check_rows(
    base: Base,
    rows: Rows,
    metrics: Sequence[str],
    *,
    max_rows: int | None = None,
    chat_template: str | None = None,
    seed: int = 0,
) -> None:
    """Raises at once what :func:`evaluate` would say against the rows; the arguments are its own.

    Raises:
        UsageError: an unknown metric. DataError: no rows, a row without an answer, or a reference that a metric cannot
            use.
    """
    _questions(_sample(rows, max_rows, seed), base, resolve_metrics(metrics), chat_template)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _questions(rows: Rows, base: Base, metrics: Sequence[Metric], chat_template: str | None) -> list[_Question]:
    texts = any(metric.score is not None for metric in metrics)
    questions = [_question(row, base, chat_template, texts) for row in rows.conversations]
    _check_references(metrics, questions)
    return questions


def _sample(rows: Rows, max_rows: int | None, seed: int) -> Rows:
    """At most ``max_rows`` rows, drawn and not the first ones: files are often sorted by topic or difficulty."""
    if not len(rows):
        raise DataError("there are no rows to evaluate on", where=rows.source, fix="give a file with at least one row")
    if max_rows is None or max_rows >= len(rows):
        return rows
    picked = sorted(random.Random(seed).sample(range(len(rows)), max_rows))
    return rows.subset(picked, f"{rows.description}; a sample of {max_rows:,} rows")


def _question(row: Conversation, base: Base, chat_template: str | None, texts: bool) -> _Question:
    if texts and row.text is not None:
        raise DataError(
            "a row of raw text has no answer to grade",
            where=row.row_id,
            fix="measure perplexity alone on raw text, or give rows with a prompt and an answer",
        )
    if texts:
        example = render_prompt(row, base.tokenizer, chat_template)
        return _Question(row, prompt_text(row), example.reference, example.prompt_ids)
    reference = row.text if row.text is not None else row.messages[_answer_index(row)].content
    return _Question(row, prompt_text(row), reference, [])


def prompt_text(row: Conversation) -> str:
    """What a reader sees of the prompt: a single turn as it is, several turns each behind its role; "" for raw text."""
    turns = row.messages[: _answer_index(row)] if row.messages else ()
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _answer_index(row: Conversation) -> int:
    for index in reversed(range(len(row.messages))):
        if row.messages[index].role == "assistant":
            return index
    raise DataError(
        "the row has no assistant turn to compare with", where=row.row_id, fix="add the answer, or remove the row"
    )


def _check_references(metrics: Sequence[Metric], questions: Sequence[_Question]) -> None:
    """Fails now on a reference that a metric cannot use, rather than after all answers are generated."""
    for metric in metrics:
        if metric.score is None:
            continue
        for question in questions:
            try:
                metric.score("", question.reference)  # an empty answer: no metric takes long over it
            except VeneerError as error:
                error.where = error.where or question.conversation.row_id
                raise


# --- what the models say ---------------------------------------------------------------------------------------------


def _likelihoods(
    base: Base, rows: Rows, chat_template: str | None, tell: Callable[[int, int], None]
) -> list[_Likelihood | None]:
    """Each row's reference under the model as it stands (teacher forcing); None where it exceeds the context."""
    dataset = render(
        [_plain_turns(row) for row in rows.conversations],
        base.tokenizer,
        max_length=_context_length(base.module),
        train_on="last",
        overlong="drop",
        chat_template=chat_template,
    )
    # Dropped rows are missing from the data set, the others keep their order.
    place, index_of = 0, {}
    for index in range(len(dataset)):
        while rows.conversations[place].row_id != dataset.row_ids[index]:
            place += 1
        index_of[index] = place
        place += 1
    padding = base.tokenizer.pad_token_id or 0  # right padding: no real token ever sees it
    found: list[_Likelihood | None] = [None] * len(rows)
    done = 0
    for batch_rows in _by_length([int(n) for n in dataset.lengths]):
        batch = collate_padded([dataset.row(index) for index in batch_rows], padding)
        nll, tokens = answer_logprobs(base.module, batch)
        for index, row_nll, row_tokens in zip(batch_rows, nll.tolist(), tokens.tolist()):
            if not math.isfinite(row_nll):
                raise ModelError(
                    f"the log-likelihood of the reference answer is {row_nll}",
                    where=dataset.row_ids[index],
                    fix="check the weights for NaN, or load the model in float32",
                )
            found[index_of[index]] = _Likelihood(row_nll, int(row_tokens))
        done += len(batch_rows)
        tell(done, len(dataset))
    return found


def _plain_turns(row: Conversation) -> Conversation:
    """The row without its turns' own ``train`` flags: here it is always the last answer that counts."""
    turns = tuple(dataclasses.replace(turn, train=None) for turn in row.messages)
    return dataclasses.replace(row, messages=turns)


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of row indices, longest first (memory shows itself at once), padded to at most ``BATCH_TOKENS``."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, BATCH_TOKENS // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _context_length(module: nn.Module) -> int:
    config: Any = module.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1)


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """No dropout while measuring; a module in the midst of training goes on as it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _base_of(model: Base | AdaptedModel) -> Base:
    base = model.base if isinstance(model, AdaptedModel) else model
    if not isinstance(base, Base):
        raise UsageError(
            "this model has no tokenizer to evaluate with",
            fix="attach the adapter to what veneer.load_base returns, or evaluate in a loop of your own",
        )
    if base.labels:
        raise UsageError(
            "this model is a classifier: it writes no answers",
            fix="measure it with veneer.evaluate.classify.evaluate_classes, or with 'veneer eval' on its run folder",
        )
    return base


def _load(spec: str) -> Base | AdaptedModel:
    from veneer.run import load_model

    return load_model(spec)


def _template_of_run(spec: str) -> str | None:
    """The chat template that a run was trained with: measured under another one, it would look broken."""
    from veneer.run import is_run, open_run

    if not is_run(spec):
        return None
    template = open_run(spec).recipe.data.chat_template
    return None if template is None else str(template)


def _silent(what: str, done: int, total: int) -> None:
    pass


# --- what that comes to ----------------------------------------------------------------------------------------------


def _rows(
    metrics: Sequence[Metric], questions: Sequence[_Question], answers: _Answers, base_answers: _Answers | None
) -> list[RowResult]:
    results = []
    for index, question in enumerate(questions):
        said, likelihood = answers.generations[index], answers.likelihoods[index]
        base_said = base_answers.generations[index] if base_answers else None
        base_likelihood = base_answers.likelihoods[index] if base_answers else None
        results.append(
            RowResult(
                row_id=question.conversation.row_id,
                prompt=question.prompt,
                reference=question.reference,
                prediction=said.text if said else None,
                base_prediction=base_said.text if base_said else None,
                scores=_scores(metrics, question, said, likelihood),
                base_scores=_scores(metrics, question, base_said, base_likelihood) if base_answers else None,
                finish_reason=said.finish_reason if said else None,
                base_finish_reason=base_said.finish_reason if base_said else None,
                answer_tokens=likelihood.tokens if likelihood else None,
                answer_nll=likelihood.nll if likelihood else None,
                base_answer_nll=base_likelihood.nll if base_likelihood else None,
            )
        )
    return results


def _scores(
    metrics: Sequence[Metric], question: _Question, said: Generation | None, likelihood: _Likelihood | None
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric.score is not None and said is not None:
            scores.update(score(metric, said.text, question.reference))
        elif metric.score is None and likelihood is not None:
            scores[metric.name] = math.exp(min(likelihood.nll / likelihood.tokens, LARGEST_EXPONENT))
    return scores


def _aggregate(
    metrics: Sequence[Metric], rows: Sequence[RowResult], seed: int, resamples: int
) -> dict[str, MetricResult]:
    """Each metric over the rows that have it (rows need not share the same JSON fields)."""
    found: dict[str, MetricResult] = {}
    asked = {metric.name for metric in metrics}
    for metric in metrics:
        prefix = metric.name + "."
        fields = (name for row in rows for name in row.scores if name.startswith(prefix) and name not in asked)
        names = [metric.name, *fields]
        for name in dict.fromkeys(names):
            having = [row for row in rows if name in row.scores]
            if not having:
                raise DataError(
                    f"no row could be measured with {name}",
                    where=rows[0].row_id,
                    fix="the rows are longer than the model's context: shorten them, or use another base",
                )
            if metric.name == PERPLEXITY:
                estimate = _perplexity(having, seed, resamples)
            else:
                values = [row.scores[name] for row in having]
                base_values = [row.base_scores[name] for row in having if row.base_scores is not None]
                estimate = bootstrap_mean(values, base_values or None, seed=seed, resamples=resamples)
            found[name] = _result(estimate, len(having), metric.higher_is_better)
    return found


def _perplexity(rows: Sequence[RowResult], seed: int, resamples: int) -> PairedEstimate:
    nll = [row.answer_nll for row in rows]
    base_nll = [row.base_answer_nll for row in rows if row.base_answer_nll is not None]
    tokens = [row.answer_tokens for row in rows]
    return bootstrap_perplexity(nll, tokens, base_nll or None, seed=seed, resamples=resamples)


def _result(estimate: PairedEstimate, rows: int, higher_is_better: bool) -> MetricResult:
    base, difference = estimate.base, estimate.difference
    return MetricResult(
        value=estimate.value.value,
        low=estimate.value.low,
        high=estimate.value.high,
        base_value=base.value if base else None,
        base_low=base.low if base else None,
        base_high=base.high if base else None,
        difference=difference.value if difference else None,
        difference_low=difference.low if difference else None,
        difference_high=difference.high if difference else None,
        rows=rows,
        higher_is_better=higher_is_better,
    )


def _wants_perplexity(metrics: Sequence[Metric]) -> bool:
    return any(metric.name == PERPLEXITY for metric in metrics)
