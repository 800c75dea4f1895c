"""What an evaluation found: metrics with intervals, a record per row, a table, a verdict, and a JSON file of it all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import DataError, UsageError, did_you_mean
from veneer.evaluate.metrics import METRICS, resolve_metric
from veneer.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = "veneer-evaluation/1"
MAX_TABLE_FIELDS = 20  # of one metric's named fields; the JSON file holds them all


@dataclass(frozen=True)
class MetricResult:
    """A metric over all rows. Every ``low`` and ``high`` bound the paired bootstrap's interval around their value.

    The base's figures and the difference (adapter minus base) are None where no base was measured.
    """

    value: float
    low: float
    high: float
    base_value: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    base_low: float | None = None
    base_high: float | None = None
    rows: int = 0  # that this metric could be measured on
    higher_is_better: bool = True

    @property
    def verdict(self) -> str:
        """ "better", "worse", "unclear" (the difference's interval holds zero), or "" without a base."""
        if self.difference_low is None or self.difference_high is None:
            return ""
        if self.difference_low <= 0 <= self.difference_high:
            return "unclear"
        return "better" if (self.difference_low > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class RowResult:
    """One row: what was asked, what the answer should have been, what each model said, and how that scored.

    Predictions are None where no metric asked for text. ``answer_nll`` is the summed negative log-likelihood (nats) of
    the reference's ``answer_tokens`` tokens, the stop token among them; None where it was not measured.
    """

    row_id: str
    prompt: str
    reference: str
    prediction: str | None
    base_prediction: str | None
    scores: dict[str, float]
    base_scores: dict[str, float] | None
    finish_reason: str | None = None
    base_finish_reason: str | None = None
    answer_tokens: int | None = None
    answer_nll: float | None = None
    base_answer_nll: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`veneer.evaluate`."""

    metrics: dict[str, MetricResult]
    rows: list[RowResult]
    model: str = ""
    base: dict[str, Any] = field(default_factory=dict)  # the identity of the base
    data_source: str = ""
    data_hash: str = ""
    max_new_tokens: int = 0
    confidence: float = 0.95
    resamples: int = 0
    seed: int = 0
    seconds: float = 0.0
    too_long: int = 0  # rows left out of the perplexity because they do not fit the model's context

    @property
    def compared(self) -> bool:
        """Whether the base was measured beside the adapter."""
        return any(result.base_value is not None for result in self.metrics.values())

    @property
    def cut(self) -> int:
        """How many answers did not stop by themselves within ``max_new_tokens``."""
        return sum(row.finish_reason == "length" for row in self.rows)

    @property
    def base_cut(self) -> int:
        """The same of the base's answers."""
        return sum(row.base_finish_reason == "length" for row in self.rows)

    def headline(self, name: str | None = None) -> str:
        """The metric that stands for the evaluation: ``name``, else the first.

        Raises:
            UsageError: ``name`` was not measured.
        """
        if name is None:
            return next(iter(self.metrics))
        if name not in self.metrics:
            raise UsageError(
                f"the metric '{name}' was not measured",
                fix=did_you_mean(name, self.metrics) or "measured: " + ", ".join(self.metrics),
            )
        return name

    def verdict(self, name: str | None = None) -> str:
        """One sentence: what was measured on how many rows, before and after, with the interval."""
        name = self.headline(name)
        result = self.metrics[name]
        rows = plural(result.rows, "held-out row")
        now = format_value(name, result.value)
        if result.base_value is None or result.difference is None:
            interval = f"{format_value(name, result.low)} to {format_value(name, result.high)}"
            return f"{label(name)} on {rows} is {now} ({self._percent} interval {interval})."
        before = format_value(name, result.base_value)
        if result.difference == result.difference_low == result.difference_high == 0:
            return f"{label(name)} on {rows} is {now} before and after: no row's score changed."
        change = format_difference(name, result.difference)
        low = format_difference(name, result.difference_low or 0.0)
        high = format_difference(name, result.difference_high or 0.0)
        points = " points" if is_rate(name) else ""
        interval = f"{change}{points}, {self._percent} interval {low} to {high}"
        if result.verdict == "unclear":
            return f"{label(name)} on {rows} went from {before} to {now} ({interval}): no clear difference."
        verb = "rose" if result.difference > 0 else "fell"
        return f"{label(name)} on {rows} {verb} from {before} to {now} ({interval})."

    @property
    def _percent(self) -> str:
        return f"{100 * self.confidence:g} %"

    def table(self) -> Table:
        """A rich table: a line per metric, base beside adapter where both were measured."""
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self._caption(), caption_justify="left", title_justify="left")
        table.add_column("metric")
        if self.compared:
            table.add_column("base", justify="right")
            table.add_column("adapter", justify="right")
            table.add_column("difference", justify="right")
        else:
            table.add_column("value", justify="right")
        table.add_column(f"{self._percent} interval", justify="right")
        for name, result in shown_metrics(self.metrics):
            cells = [Text(("  ." + name.partition(".")[2]) if is_field(name, self.metrics) else name)]
            if result.base_value is None or result.difference is None:
                cells += [Text("-"), Text("-")] if self.compared else []
                cells.append(Text(format_value(name, result.value)))
                interval = f"{format_value(name, result.low)} to {format_value(name, result.high)}"
            else:
                style = {"better": "green", "worse": "red"}.get(result.verdict, "")
                cells += [Text(format_value(name, result.base_value)), Text(format_value(name, result.value))]
                cells.append(Text(format_difference(name, result.difference), style=style))
                low, high = result.difference_low or 0.0, result.difference_high or 0.0
                interval = f"{format_difference(name, low)} to {format_difference(name, high)}"
            table.add_row(*cells, Text(interval))
        return table

    def _caption(self) -> str:
        parts = [plural(len(self.rows), "row") + (f" of {self.data_source}" if self.data_source else "")]
        hidden = len(self.metrics) - len(shown_metrics(self.metrics))
        if hidden:
            parts.append(plural(hidden, "more field") + " in the JSON file")
        if self.cut or self.base_cut:
            whose = f": {self.cut:,} of the adapter's, {self.base_cut:,} of the base's" if self.compared else ""
            parts.append(plural(self.cut + self.base_cut, "answer") + f" cut at {self.max_new_tokens} tokens{whose}")
        if self.too_long:
            parts.append(plural(self.too_long, "row") + " too long for the perplexity")
        return "; ".join(parts)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values; :meth:`from_dict` reads it back."""
        # The order of the metrics (the first is the headline) stands by itself: writers of JSON may sort the keys.
        counts = {"cut": self.cut, "base_cut": self.base_cut}
        return {"format": FORMAT, "order": list(self.metrics), **asdict(self), **counts}

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: str | None = None) -> Evaluation:
        """Reads what :meth:`to_dict` returned.

        Raises:
            DataError: another format, or keys that are missing or unknown.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DataError("this is no evaluation that Veneer wrote", where=where, fix="run veneer eval again")
        body = {key: item for key, item in value.items() if key not in ("format", "cut", "base_cut")}
        try:
            found = body.pop("metrics")
            metrics = {name: MetricResult(**found[name]) for name in body.pop("order")}
            rows = [RowResult(**row) for row in body.pop("rows")]
            if not metrics:
                raise KeyError("metrics")
            return cls(metrics=metrics, rows=rows, **body)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the evaluation is damaged: {error}", where=where, fix="delete the file and run veneer eval again"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Writes :meth:`to_dict` as JSON, atomically.

        Raises:
            StorageError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(path, without_surrogates(text))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Reads what :meth:`save` wrote.

        Raises:
            DataError: the file is not JSON, or not an evaluation.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"this is not JSON: {error}", where=str(path), fix="run veneer eval again") from error
        return cls.from_dict(value, where=str(path))


# --- how numbers are written -----------------------------------------------------------------------------------------


def is_field(name: str, metrics: dict[str, MetricResult]) -> bool:
    """Whether ``name`` is one named part of a metric that stands there itself, such as ``json_fields.amount``."""
    parent, dot, _ = name.partition(".")
    return bool(dot) and parent in metrics and not name.startswith("regex:")


def shown_metrics(metrics: dict[str, MetricResult]) -> list[tuple[str, MetricResult]]:
    """The metrics for a table: of a metric with very many fields only the first."""
    shown, count = [], 0
    for name, result in metrics.items():
        count += is_field(name, metrics)
        if not is_field(name, metrics) or count <= MAX_TABLE_FIELDS:
            shown.append((name, result))
    return shown


def is_rate(name: str) -> bool:
    """Whether the metric's values are shares in [0, 1]: all but the perplexity."""
    return name != "perplexity"


def label(name: str) -> str:
    """A metric's name as a sentence begins with it; a field stands behind its metric."""
    if name in METRICS or name.startswith("regex:"):
        return resolve_metric(name).title
    parent, dot, part = name.partition(".")
    title = METRICS[parent].title if parent in METRICS else parent.replace("_", " ").capitalize()
    return title + dot + part


def plural(count: int, thing: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def format_value(name: str, value: float) -> str:
    """A share in per cent, a perplexity with two decimals."""
    return f"{100 * value:.1f} %" if is_rate(name) else _plain(value)


def format_difference(name: str, value: float) -> str:
    """A difference of shares in points, always with its sign; the minus is a real one."""
    text = f"{100 * value:+.1f}" if is_rate(name) else ("+" if value >= 0 else "-") + _plain(abs(value))
    if not text.strip("+-0.,"):
        text = text[1:]  # "+0.0" and "-0.0" are no direction
    return text.replace("-", "−")


def _plain(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def without_surrogates(text: str) -> str:
    """Lone surrogates, which JSON data may hold and UTF-8 may not, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
