"""Metrics: pure functions from a prediction and a reference to a score in [0, 1], or to several named scores.

A reference that a metric cannot use (no number in it, not JSON) is an error, never a zero: it says that the metric
does not fit the data. A prediction that it cannot use is a wrong answer and scores 0.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from veneer.errors import DataError, UsageError, did_you_mean
from veneer.evaluate.json_metrics import json_exact, json_fields, json_valid

Scores = float | dict[str, float]
REGEX_PREFIX = "regex:"


@dataclass(frozen=True)
class Metric:
    """One way to grade an answer.

    ``score`` is None for ``perplexity``, which is measured from log-probabilities and not from text. ``title`` names
    the metric in a sentence. ``is_graded`` tells a metric with shades (an overlap) from one that says right or wrong.
    """

    name: str
    score: Callable[[str, str], Scores] | None
    title: str
    description: str
    higher_is_better: bool = True
    is_graded: bool = False


# --- text ------------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same text; only white space around them is ignored."""
    return float(prediction.strip() == reference.strip())


def normalized_match(prediction: str, reference: str) -> float:
    """1 where both are the same after SQuAD's normalisation (case, punctuation, articles, white space) and NFKC."""
    left, right = _normalize_pair(prediction, reference)
    return float(left == right)


def contains(prediction: str, reference: str) -> float:
    """1 where the reference stands somewhere in the prediction; case, width of letters and runs of space are ignored.

    An empty reference is contained in an empty prediction only.
    """
    needle, hay = _fold(reference), _fold(prediction)
    return float(needle in hay if needle else not hay)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that both share, as SQuAD computes it (Rajpurkar et al. 2016, section 6)."""
    left, right = (text.split() for text in _normalize_pair(prediction, reference))
    if not left or not right:
        return float(left == right)
    common = (Counter(left) & Counter(right)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall)


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _without_punctuation(text: str) -> str:
    # SQuAD removes string.punctuation, which holds symbols too ($ + < =); Unicode's own punctuation joins it here.
    return "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))


def _normalize_pair(prediction: str, reference: str) -> tuple[str, str]:
    """Both texts normalised alike, and never so far that nothing is left of the reference.

    SQuAD's rules leave nothing of the answer "A" (an article) or "%": any other such text would match it. For such a
    reference the articles are kept, and if that is not enough, the punctuation.
    """
    folded = [_fold(prediction), _fold(reference)]
    plain = [_without_punctuation(text) for text in folded]
    bare = [_ARTICLES.sub(" ", text) for text in plain]
    for pair in (bare, plain, folded):
        left, right = (" ".join(text.split()) for text in pair)
        if right:
            break
    return left, right


# --- numbers ---------------------------------------------------------------------------------------------------------

# A sign counts only where no operand stands before it: "10-5" ends in 5, "= -5" in -5. Thousands are groups of exactly
# three digits; what follows a comma otherwise is another number ("1, 2" and "1,25").
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]%])[-+])?[$€£¥₹]?(?P<inner>(?<=[$€£¥₹])[-+])?"
    r"(?P<digits>(?:\d{1,3}(?:[,'\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,4}\b)?"
)
_MARKED = re.compile(r"####\s*(?=[-+$€£¥₹.\d])")
_MINUS = str.maketrans({"\u2212": "-", "\ufe63": "-", "\uff0d": "-"})
_GROUPING = str.maketrans("", "", ",'\u00a0\u2009\u202f")


def last_number(text: str) -> Decimal | None:
    """The number that a text answers with: the one after the last ``####``, else the last one; None without any.

    Thousands separators (1,234), signs, decimals, a currency sign and a per cent sign are understood; 15% is 15.
    """
    text = text.translate(_MINUS)
    marks = list(_MARKED.finditer(text))
    if marks:
        found = _NUMBER.match(text, marks[-1].end())
        if found:
            return _decimal(found)
    numbers = list(_NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def _decimal(found: re.Match[str]) -> Decimal:
    sign = found["sign"] or found["inner"] or ""
    return Decimal(sign + found["digits"].translate(_GROUPING) + (found["exponent"] or ""))


def number_match(prediction: str, reference: str) -> float:
    """1 where both end in the same number (GSM8K's rule); see :func:`last_number`.

    Raises:
        DataError: the reference holds no number.
    """
    expected = last_number(reference)
    if expected is None:
        raise DataError(
            f"the reference holds no number: {_short(reference)}",
            fix="use another metric than number_match, or mend the row",
        )
    return float(last_number(prediction) == expected)


# --- regular expressions ---------------------------------------------------------------------------------------------


def regex_match(pattern: re.Pattern[str], prediction: str, reference: str) -> float:
    """1 where ``pattern`` finds the same text in both: its group 1 where it has one, else the whole match.

    Raises:
        DataError: the pattern finds nothing in the reference.
    """
    expected = _extract(pattern, reference)
    if expected is None:
        raise DataError(
            f"the pattern '{pattern.pattern}' finds nothing in the reference: {_short(reference)}",
            fix="mend the pattern of the metric, or the row",
        )
    return float(_extract(pattern, prediction) == expected)


def _extract(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    if found is None:
        return None
    part: str | None = found.group(1 if pattern.groups else 0)
    return None if part is None else part.strip()


# --- ROUGE -----------------------------------------------------------------------------------------------------------

# One token per character of the scripts that put no spaces between words, else one per word.
_ROUGE_TOKEN = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+")


class _UnicodeTokenizer:
    """rouge-score's own tokenizer keeps a-z and 0-9 alone, so that Greek or Chinese answers all score 0.

    On text of those letters it and this one agree.
    """

    def tokenize(self, text: str) -> list[str]:
        return [str(token) for token in _ROUGE_TOKEN.findall(_fold(text))]


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UsageError(
            "the metric rouge_l needs the rouge-score library",
            fix="pip install 'veneer[eval]', or leave rouge_l out of the metrics",
        ) from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_UnicodeTokenizer())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by the rouge-score library, without stemming.

    Raises:
        UsageError: the library is not installed.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


# --- the table of metrics --------------------------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match, "Exact match", "the same text"),
        Metric("normalized_match", normalized_match, "Normalised match", "the same but for case and punctuation"),
        Metric("contains", contains, "Containment", "the reference stands in the answer"),
        Metric("number_match", number_match, "Number match", "the same last number"),
        Metric("json_valid", json_valid, "Valid JSON", "the answer is strict JSON"),
        Metric("json_exact", json_exact, "Exact JSON match", "the same JSON value"),
        Metric(
            "json_fields",
            json_fields,
            "JSON field accuracy",
            "share of the fields that are right",
            is_graded=True,
        ),
        Metric("token_f1", token_f1, "Token F1", "words shared with the reference", is_graded=True),
        Metric("rouge_l", rouge_l, "ROUGE-L", "longest common subsequence with the reference", is_graded=True),
        Metric("perplexity", None, "Perplexity", "of the reference answer given the prompt", False, is_graded=True),
    )
}


def resolve_metric(name: str) -> Metric:
    """The metric of that name; ``regex:PATTERN`` makes one.

    Raises:
        UsageError: an unknown name, or a pattern that is no regular expression.
    """
    if name in METRICS:
        return METRICS[name]
    if name.startswith(REGEX_PREFIX) and len(name) > len(REGEX_PREFIX):
        text = name.removeprefix(REGEX_PREFIX)
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UsageError(
                f"'{text}' is no regular expression: {error}", where=f"metric {name}", fix="mend the pattern"
            ) from error
        return Metric(name, functools.partial(regex_match, pattern), f"Match at /{text}/", f"the same text at /{text}/")
    known = [*METRICS, "regex:PATTERN"]
    if name.rstrip(":") == "regex":
        hint = "write regex:PATTERN, for example regex:answer is (\\w+)"
    else:
        hint = did_you_mean(name.lower(), known) or "use one of " + ", ".join(known)
    raise UsageError(f"unknown metric '{name}'", where="metrics", fix=hint)


def resolve_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of those names, in their order.

    Raises:
        UsageError: no name at all, an unknown one, or one that stands twice.
    """
    if not names:
        raise UsageError("no metric to evaluate", where="metrics", fix="name at least one of " + ", ".join(METRICS))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"metric '{twice[0]}' stands twice", where="metrics", fix="name each metric once")
    return [resolve_metric(name) for name in names]


def score(metric: Metric | str, prediction: str, reference: str) -> dict[str, float]:
    """The named scores of one answer: one under the metric's name, or several (``json_fields`` and its fields).

    Raises:
        UsageError: an unknown metric, or ``perplexity``, which is not scored from text.
        DataError: the metric cannot use this reference.
    """
    chosen = resolve_metric(metric) if isinstance(metric, str) else metric
    if chosen.score is None:
        raise UsageError(
            f"{chosen.name} is measured from log-probabilities, not from an answer's text", fix="use veneer.evaluate"
        )
    value = chosen.score(prediction, reference)
    return value if isinstance(value, dict) else {chosen.name: value}


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= limit else line[: limit - 1] + "…")
