"""The report's verdict, tables and curves, and the order of all its sections: functions from a run's record to HTML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from veneer.evaluate.charts import Series, line_chart, number, smoothed
from veneer.evaluate.evaluation import (
    Evaluation,
    MetricResult,
    format_difference,
    format_value,
    is_field,
    is_rate,
    plural,
    shown_metrics,
)
from veneer.evaluate.markup import Html, duration, esc, section, tag
from veneer.evaluate.metrics import METRICS, resolve_metric
from veneer.evaluate.record import RunRecord, headline_evaluation, points
from veneer.evaluate.section_answers import samples, timeline
from veneer.evaluate.section_classes import classes, description_of, sides, title_of
from veneer.evaluate.section_origin import data_summary, footer, mask_example, provenance, recipe

# --- the head --------------------------------------------------------------------------------------------------------


def verdict(record: RunRecord) -> str:
    """The sentence at the top: what was measured, before and after."""
    found = headline_evaluation(record)
    if found:
        return found[0].verdict(found[1])
    losses = points(record.held_out, "eval_loss")
    if len(losses) > 1:
        (first, before), (last, now) = losses[0], min(losses, key=lambda point: point[1])
        if now >= before:
            return f"The held-out loss did not fall: {before:.3f} at step {first:,.0f}, and never below."
        return f"The held-out loss fell from {before:.3f} at step {first:,.0f} to {now:.3f} at step {last:,.0f}."
    if len(losses) == 1:
        return f"The held-out loss is {losses[0][1]:.3f} at step {losses[0][0]:,.0f}."
    train = points(record.steps, "loss")
    if train:
        return (
            f"The training loss went from {train[0][1]:.3f} to {train[-1][1]:.3f}; "
            "nothing was measured on held-out rows."
        )
    return "Nothing has been measured yet."


def hero(record: RunRecord) -> Html:
    """The verdict, the two numbers behind it, and the run's facts in a row of tiles."""
    found = headline_evaluation(record)
    figures = None
    if found:
        evaluation, name = found
        result, (before, after) = evaluation.metrics[name], sides(evaluation)
        if result.base_value is not None and result.difference is not None:
            figures = tag(
                "div",
                tag("div", tag("span", before), tag("b", format_value(name, result.base_value)), class_="figure base"),
                tag("div", "→", class_="arrow", aria_hidden="true"),
                tag("div", tag("span", after), tag("b", format_value(name, result.value)), class_="figure after"),
                class_=f"figures {result.verdict}",
            )
    tiles = [tag("div", tag("dt", name), tag("dd", value)) for name, value in _facts(record)]
    return tag(
        "header",
        tag("p", "Veneer report", tag("span", record.folder.resolve().name), class_="over"),
        tag("div", tag("h1", _unbroken(verdict(record))), figures, class_="verdict"),
        _status(record),
        tag("dl", *tiles, class_="tiles") if tiles else None,
    )


def _unbroken(sentence: str) -> Html:
    """The sentence, never broken at the hyphen of "held-out" nor before a per cent sign."""
    sentence = sentence.replace(" %", "\u00a0%")
    return Html(esc(sentence).replace("held-out", tag("span", "held-out", class_="nowrap")))


def _status(record: RunRecord) -> Html | None:
    status, error = record.info.get("status"), record.info.get("error")
    if status in (None, "finished", "done"):
        return None
    why = f" It said: {error}." if error else ""
    return tag("p", "This run is ", tag("b", status), f": what follows is what it had reached.{why}", class_="notice")


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    info = record.info
    facts = []
    if (trainable := info.get("trainable_parameters")) is not None:
        facts.append(("trained parameters", _count(trainable)))
    if (seconds := info.get("train_seconds")) is not None:
        facts.append(("training", duration(seconds)))
    if (speed := info.get("tokens_per_second")) is not None:
        facts.append(("tokens per second", f"{speed:,.0f}"))
    if (memory := info.get("peak_rss_gb")) is not None:
        facts.append(("peak memory", f"{memory:.2f} GB"))
    if record.adapter_bytes is not None:
        facts.append(("adapter on disk", f"{record.adapter_bytes / 1e6:.1f} MB"))
    if record.steps:
        last = record.steps[-1]
        facts.append(("steps", f"{last['step']:,}"))
    return facts


# --- before and after ------------------------------------------------------------------------------------------------


def comparison(evaluation: Evaluation, title: str) -> Html:
    """The table of metrics with a bar each for base and adapter, and the interval of the difference."""
    largest = max(
        (max(r.high, r.base_high or 0.0, r.value) for n, r in evaluation.metrics.items() if not is_rate(n)), default=1.0
    )
    rows = [_metric_row(name, result, evaluation, largest * 1.08) for name, result in shown_metrics(evaluation.metrics)]
    compared = evaluation.compared
    heads = ["metric", "", *sides(evaluation), "difference"] if compared else ["metric", "", "value"]
    head = tag("thead", tag("tr", *[tag("th", text, scope="col") for text in heads]))
    rate = next((r for n, r in evaluation.metrics.items() if is_rate(n)), None)
    note = (
        f"Intervals hold {100 * evaluation.confidence:g} % of {evaluation.resamples:,} paired bootstrap resamples of "
        f"the rows (seed {evaluation.seed}). Differences of shares are in percentage points."
    )
    if rate is not None and any(r.low == r.high for n, r in evaluation.metrics.items() if is_rate(n)):
        note += (
            " Where all rows score alike there is nothing to resample and the interval has no width; the true share "
            f"may still lie up to {min(100.0, 300 / max(1, rate.rows)):.1f} points away, with {rate.rows:,} rows."
        )
    return section(
        title,
        tag("table", head, tag("tbody", *rows), class_="metrics" + ("" if compared else " single")),
        tag("p", note, class_="fine"),
        intro=_where_from(evaluation),
    )


def _where_from(evaluation: Evaluation) -> str:
    parts = [plural(len(evaluation.rows), "held-out row")]
    if evaluation.data_source:
        parts[0] += f" of {evaluation.data_source}"
    texts = any(row.prediction is not None for row in evaluation.rows)
    if texts and evaluation.max_new_tokens:
        parts.append(f"greedy decoding, at most {evaluation.max_new_tokens:,} new tokens")
    if evaluation.cut or evaluation.base_cut:
        who = [
            f"{evaluation.cut:,} of the adapter’s answers" if evaluation.compared else plural(evaluation.cut, "answer")
        ]
        if evaluation.compared:
            who.append(f"{evaluation.base_cut:,} of the base’s")
        parts.append(" and ".join(who) + " did not stop by themselves")
    if evaluation.too_long:
        parts.append(plural(evaluation.too_long, "row") + " too long for the perplexity")
    return "; ".join(parts) + "."


def _metric_row(name: str, result: MetricResult, evaluation: Evaluation, largest: float) -> Html:
    part = is_field(name, evaluation.metrics)
    scale = 1.0 if is_rate(name) else largest
    title = name.partition(".")[2] if part else title_of(name)
    told = None if part else _description(name)
    bars = [_bar("after", result.value, result.low, result.high, scale)]
    cells: list[Html] = []
    if result.base_value is not None and result.difference is not None:
        bars.insert(0, _bar("base", result.base_value, result.base_low, result.base_high, scale))
        low, high = result.difference_low or 0.0, result.difference_high or 0.0
        span = f"{format_difference(name, low)} to {format_difference(name, high)}"
        chip = {"better": "better", "worse": "worse", "unclear": "no clear change"}[result.verdict]
        cells = [
            tag("td", format_value(name, result.base_value), class_="num base-value", data_label="base"),
            tag("td", tag("b", format_value(name, result.value)), class_="num", data_label="adapter"),
            tag(
                "td",
                tag("span", format_difference(name, result.difference), class_=f"delta {result.verdict}", title=chip),
                tag("span", span, class_="span"),
                class_="num",
                data_label="difference",
            ),
        ]
    else:
        span = f"{format_value(name, result.low)} to {format_value(name, result.high)}"
        cells = [
            tag(
                "td",
                tag("b", format_value(name, result.value)),
                tag("span", span, class_="span"),
                class_="num",
                data_label="value",
            )
        ]
    head = tag("th", title, tag("span", told, class_="told") if told else None, scope="row")
    return tag("tr", head, tag("td", *bars, class_="bars"), *cells, class_="part" if part else None)


def _description(name: str) -> str:
    if told := description_of(name):
        return told
    metric = METRICS.get(name) or resolve_metric(name)
    return metric.description + ("" if metric.higher_is_better else "; lower is better")


def _bar(style: str, value: float, low: float | None, high: float | None, scale: float) -> Html:
    def share(number: float) -> float:
        return 100 * min(1.0, max(0.0, number / scale))

    whisker = None
    if low is not None and high is not None and high > low:
        whisker = tag("i", style=f"left:{share(low):.2f}%;width:{share(high) - share(low):.2f}%")
    fill = tag("span", style=f"width:{share(value):.2f}%")
    return tag("div", fill, whisker, class_=f"bar {style}", aria_hidden="true")


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(record: RunRecord) -> Html:
    """Loss large, then the learning rate, the gradient norm, the speed and the held-out metrics small."""
    loss, held = points(record.steps, "loss"), points(record.held_out, "eval_loss")
    lines = []
    if loss:
        many = len(loss) > 40
        if many:
            lines.append(Series("train", loss, "train", faint=True))
        smooth = smoothed(loss) if many else loss
        lines.append(Series("train, smoothed" if many else "train", smooth, "train", note=f"{smooth[-1][1]:.3f}"))
    if held:
        best = min(held, key=lambda point: point[1])
        lines.append(Series("held-out", held, "held", note=f"lowest {best[1]:.3f} at step {best[0]:,.0f}", dots=True))
    small = [
        _small("Learning rate", record.steps, "learning_rate", "plain"),
        _small("Gradient norm", record.steps, "grad_norm", "plain"),
        _small("Tokens per second", record.steps, "tokens_per_second", "plain"),
    ]
    names = dict.fromkeys(key for line in record.held_out for key in line if key.startswith("eval_"))
    usual = {"eval_loss", "eval_perplexity"}
    for key in names:
        if key not in usual and "." not in key and len(found := points(record.held_out, key)) > 1:
            title = title_of(key.removeprefix("eval_")) + ", held-out"
            small.append(line_chart(title, [Series("", found, "held", note=number(found[-1][1]), dots=True)]))
    small = [chart for chart in small if chart]
    columns = 2 if len(small) in (2, 4) else min(3, len(small))  # full rows where the page is wide
    return section(
        "Training",
        line_chart("Loss per trained token", lines),
        tag("div", *small, class_=f"small-charts in-{columns}") if small else None,
    )


def _small(title: str, lines: list[dict[str, Any]], key: str, style: str) -> Html:
    found = points(lines, key)
    if not found:
        return Html("")
    return line_chart(title, [Series("", found, style, note=f"last {number(found[-1][1])}")], from_zero=True)


def _count(value: float) -> str:
    return f"{value / 1e6:,.2f} M" if value >= 1e6 else f"{value:,}"


# --- all of it ---


def all_sections(record: RunRecord) -> Iterable[Html]:
    """The page's body, in order."""
    yield hero(record)
    many = len(record.evaluations) > 1
    for name, evaluation in record.evaluations.items():
        yield comparison(evaluation, f"Before and after: {name}" if many else "Before and after")
    yield classes(record)
    yield curves(record)
    yield samples(record)
    yield timeline(record)
    yield mask_example(record)
    yield data_summary(record)
    yield recipe(record)
    yield provenance(record)
    yield footer(record)
