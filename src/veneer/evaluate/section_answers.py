"""The report's answers: base and adapter side by side, and one answer as it changed while training."""

from __future__ import annotations

import re
from collections.abc import Mapping

from veneer.evaluate.class_scores import is_classification
from veneer.evaluate.evaluation import RowResult, label
from veneer.evaluate.markup import Html, marked, plain, section, tag
from veneer.evaluate.metrics import METRICS, resolve_metric
from veneer.evaluate.record import RunRecord, headline_evaluation

SAMPLES_OF_A_KIND = {"broken": 4, "fixed": 4, "wrong": 4, "kept": 2}
KINDS = {
    "fixed": "fixed by the adapter",
    "kept": "right before and after",
    "wrong": "wrong before and after",
    "broken": "broken by the adapter",
}
MAX_TIMELINE = 8
MAX_ANSWER, MAX_PROMPT = 600, 700  # characters shown of each


def samples(record: RunRecord) -> Html:
    """Answers side by side: what the adapter broke first, then what it fixed, what stays wrong, what stayed right."""
    found = headline_evaluation(record)
    if not found:
        return _latest_answers(record)
    evaluation, name = found
    if is_classification(evaluation):  # its predictions stand in the section of its classes
        return Html("")
    rows = [row for row in evaluation.rows if row.prediction is not None]
    if not rows:
        return _latest_answers(record)
    name = name if any(name in row.scores and name != "perplexity" for row in rows) else next(iter(rows[0].scores))
    graded = _graded(name)
    shared = shared_opening([row.prompt for row in rows])
    opening = None
    if shared:
        opening = tag("p", "Every prompt begins with ", tag("q", plain(shared.strip(), 400)), class_="opening")
    kinds: dict[str, list[RowResult]] = {kind: [] for kind in SAMPLES_OF_A_KIND}
    for row in rows:
        kinds[_kind(row, name)].append(row)
    shown: list[RowResult] = []
    if graded or not evaluation.compared:
        shown = rows[:8]
    else:
        for kind, count in SAMPLES_OF_A_KIND.items():
            shown += kinds[kind][:count]
    cards = [_card(row, name, graded, shared) for row in shown]
    strip = None if graded or not evaluation.compared else _outcome_strip({k: len(v) for k, v in kinds.items()})
    intro = f"{len(shown):,} of {len(rows):,} rows, judged by {label(name)}. "
    intro += "Words that the reference does not have there are marked in the adapter’s answers."
    return section("Answers, side by side", strip, opening, tag("div", *cards, class_="cards"), intro=intro)


def _graded(name: str) -> bool:
    return (METRICS.get(name) or resolve_metric(name)).is_graded


def _kind(row: RowResult, name: str) -> str:
    now, before = row.scores.get(name, 0.0) >= 1.0, (row.base_scores or {}).get(name, 0.0) >= 1.0
    return ("kept" if before else "fixed") if now else ("broken" if before else "wrong")


def _outcome_strip(counts: Mapping[str, int]) -> Html:
    """All rows in one bar: fixed, right in both, wrong in both, broken."""
    total = sum(counts.values())
    order = [kind for kind in KINDS if counts[kind]]
    bars = [tag("span", class_=kind, style=f"width:{100 * counts[kind] / total:.2f}%") for kind in order]
    keys = [
        tag("li", tag("b", f"{counts[kind]:,}"), " ", KINDS[kind], class_=kind if counts[kind] else f"{kind} none")
        for kind in KINDS
    ]
    return tag(
        "div",
        tag("div", *bars, class_="strip", aria_hidden="true"),
        tag("ul", *keys, class_="strip-keys"),
        class_="outcomes",
    )


def _card(row: RowResult, name: str, graded: bool, shared: str) -> Html:
    blocks = [_text("reference", row.reference, row.reference)]
    if row.base_prediction is not None:
        score = (row.base_scores or {}).get(name)
        blocks.append(_text("base", row.base_prediction, row.reference, score, graded, row.base_finish_reason))
    who = "adapter" if row.base_prediction is not None else "answer"
    blocks.append(_text(who, row.prediction or "", row.reference, row.scores.get(name), graded, row.finish_reason))
    return _card_of(row.row_id, row.prompt.removeprefix(shared), blocks)


def _card_of(row_id: str, prompt: str, blocks: list[Html]) -> Html:
    turns = re.findall(r"(?:^|\n\n)(?:user|assistant|tool): ", prompt)
    if turns == ["user: "]:  # one speaker needs no name
        prompt = prompt.removeprefix("user: ")
    return tag(
        "article",
        tag("div", row_id, class_="row-id"),
        tag("div", plain(prompt, MAX_PROMPT), class_="prompt", dir="auto"),
        tag("div", *blocks, class_=f"answers of-{len(blocks)}"),
        class_="card",
    )


def _text(
    who: str,
    text: str,
    reference: str,
    score: float | None = None,
    graded: bool = False,
    finish: str | None = None,
) -> Html:
    """One answer under its speaker's name; the words of the adapter's that differ from the reference are marked."""
    badge = None
    if score is not None and graded:
        badge = tag("span", f"{100 * score:.0f} %", class_="badge shade")
    elif score is not None:
        right = score >= 1.0
        badge = tag("span", "✓ right" if right else "✗ wrong", class_="badge right" if right else "badge wrong")
    cut = tag("span", "cut off: did not stop", class_="cut") if finish == "length" else None
    return tag(
        "div",
        tag("div", tag("span", who), badge, class_="who"),
        said(text, reference, compare=who in ("adapter", "answer")),
        cut,
        class_=f"answer {who}",
    )


def said(text: str, reference: str, *, compare: bool) -> Html:
    """A text in a block of its own; where the reference is JSON, in the code's font and a field to a line."""
    code = reference.lstrip()[:1] in ("{", "[")
    if code:
        text, reference = _by_field(text), _by_field(reference)
    if not text.strip():
        body = tag("span", "(empty)", class_="cut")
    else:
        body = marked(text, reference) if compare else plain(text, MAX_ANSWER)
    return tag("div", body, class_="said code" if code else "said", dir="auto")


def _by_field(text: str) -> str:
    """JSON on one line, broken before each key so that two answers can be compared line by line."""
    return text if "\n" in text.strip() else re.sub(r",\s*(?=\"[^\"]*\"\s*:)", ",\n ", text)


def shared_opening(prompts: list[str]) -> str:
    """The turns that all prompts begin with (a system prompt, as a rule), so that it need be shown only once."""
    if len(prompts) < 2:
        return ""
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    end = first.rfind("\n\n", 0, length)
    return first[: end + 2] if end > 0 else ""


def _latest_answers(record: RunRecord) -> Html:
    """Without an evaluation of its own: the samples of the last held-out evaluation."""
    if not record.answers:
        return Html("")
    latest = record.answers[-1]
    cards = []
    for sample in latest.samples[:6]:
        reference = str(sample.get("reference", ""))
        blocks = [
            _text("reference", reference, reference),
            _text("answer", str(sample.get("prediction", "")), reference),
        ]
        cards.append(_card_of(str(sample.get("row_id", "")), str(sample.get("prompt", "")), blocks))
    return section("Answers", tag("div", *cards, class_="cards"), intro=f"Held-out rows, at step {latest.step:,}.")


def timeline(record: RunRecord) -> Html:
    """How the answer to the first sample changed over the evaluations."""
    if len(record.answers) < 2:
        return Html("")
    row_id = record.answers[0].samples[0].get("row_id")
    found = [
        (answers.step, sample)
        for answers in record.answers
        for sample in answers.samples
        if sample.get("row_id") == row_id
    ]
    if len(found) < 2:
        return Html("")
    # The first and the last always, the others evenly between them.
    picked = sorted({round(i * (len(found) - 1) / (MAX_TIMELINE - 1)) for i in range(MAX_TIMELINE)})
    reference = str(found[0][1].get("reference", ""))
    items = [
        tag(
            "li",
            tag("span", f"step {found[index][0]:,}", class_="when"),
            said(str(found[index][1].get("prediction", "")), reference, compare=True),
        )
        for index in picked
    ]
    items.append(tag("li", tag("span", "reference", class_="when"), said(reference, reference, compare=False)))
    prompt = tag("div", plain(str(found[0][1].get("prompt", "")), MAX_PROMPT), class_="prompt", dir="auto")
    return section("One answer while training", tag("div", prompt, tag("ol", *items, class_="timeline"), class_="card"))
