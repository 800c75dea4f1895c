"""The report's part of a classifier: figures of each class, who is taken for whom, and the surest mistakes."""

from __future__ import annotations

from veneer.evaluate.class_scores import CONFIDENCE_SCORE, MACRO_F1, class_scores, confusion_of, is_classification
from veneer.evaluate.evaluation import Evaluation, label
from veneer.evaluate.markup import Html, plain, section, tag
from veneer.evaluate.record import RunRecord, headline_evaluation

MOST_MISTAKES = 12
MAX_TEXT = 400  # characters shown of a row
_TITLES = {MACRO_F1: "Macro F1"}
_DESCRIPTIONS = {
    "accuracy": "share of the rows whose class is right",
    MACRO_F1: "mean F1 of the classes",
}


def title_of(name: str) -> str:
    """A metric's name for a reader, a classifier's metrics included."""
    return _TITLES.get(name) or label(name)


def description_of(name: str) -> str | None:
    """What a classifier's metric is; None for any other."""
    return _DESCRIPTIONS.get(name)


def sides(evaluation: Evaluation) -> tuple[str, str]:
    """What the two sides of a comparison are called: a classifier is measured against the majority class."""
    return ("majority", "classifier") if is_classification(evaluation) else ("base", "adapter")


def classes(record: RunRecord) -> Html:
    """Table of classes, confusion matrix and mistakes of the headline evaluation; nothing for any other task."""
    found = headline_evaluation(record)
    if found is None or not is_classification(found[0]):
        return Html("")
    evaluation = found[0]
    names, matrix = confusion_of(evaluation)
    heads = ("class", "rows", "precision", "recall", "F1", f"{100 * evaluation.confidence:g} % interval")
    rows = []
    for score in class_scores(matrix, names):
        result = evaluation.metrics[f"{MACRO_F1}.{score.name}"]
        shares = [_share(value) for value in (score.precision, score.recall, score.f1)]
        cells = [f"{score.rows:,}", *shares, f"{_share(result.low)} to {_share(result.high)}"]
        rows.append(tag("tr", tag("th", score.name, scope="row"), *[tag("td", cell, class_="num") for cell in cells]))
    table = tag("table", _head(heads), tag("tbody", *rows), class_="facts")
    crossed = []
    for name, counts in zip(names, matrix.tolist()):
        total = max(sum(counts), 1)
        cells_of = [
            # As dark as the cell's share of its row; the number says the same without the colour.
            tag("td", f"{n:,}", class_="num", style=f"background:rgba(64,145,108,{0.75 * n / total:.2f})")
            for n in counts
        ]
        crossed.append(tag("tr", tag("th", name, scope="row"), *cells_of))
    confusion = tag("table", _head(("", *names)), tag("tbody", *crossed), class_="facts")
    return section(
        "Classes",
        table,
        tag("h3", "Who is taken for whom"),
        confusion,
        *_mistakes(evaluation),
        intro="Rows of the second table are what a text is, columns what it is taken for.",
    )


def _mistakes(evaluation: Evaluation) -> list[Html]:
    """The wrong predictions that the model was surest of: a slip of the labels shows itself here."""
    wrong = [row for row in evaluation.rows if row.prediction != row.reference]
    if not wrong:
        return []
    wrong.sort(key=lambda row: (-row.scores.get(CONFIDENCE_SCORE, 0.0), row.row_id))
    rows = [
        tag(
            "tr",
            tag("th", row.row_id, scope="row"),
            tag("td", plain(row.prompt, MAX_TEXT), dir="auto"),
            tag("td", row.reference),
            tag("td", f"{row.prediction} ({row.scores.get(CONFIDENCE_SCORE, 0.0):.0%})"),
        )
        for row in wrong[:MOST_MISTAKES]
    ]
    title = f"The surest of {len(wrong):,} mistakes"
    return [
        tag("h3", title),
        tag("table", _head(("row", "text", "is", "was taken for")), tag("tbody", *rows), class_="facts"),
    ]


def _head(titles: tuple[str, ...]) -> Html:
    return tag("thead", tag("tr", *[tag("th", title, scope="col") for title in titles]))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
