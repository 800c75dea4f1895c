"""Metrics: each rule with an example that another rule would get wrong."""

from __future__ import annotations

import builtins
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import DataError, UsageError
from veneer.evaluate import metrics as m
from veneer.evaluate.json_metrics import json_exact, json_fields, json_valid, parse_strict


def test_importing_metrics_and_the_package_imports_no_torch() -> None:
    code = (
        "import sys, veneer.evaluate, veneer.evaluate.metrics, veneer.evaluate.evaluation, veneer.evaluate.report;"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'rouge_score'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_can_still_be_called_once_it_is_imported() -> None:
    import veneer
    import veneer.evaluate

    with pytest.raises(UsageError, match="no metric"):
        veneer.evaluate("model", "data", metrics=[])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("Paris", "Paris", 1.0), (" Paris\n", "Paris", 1.0), ("paris", "Paris", 0.0), ("Paris.", "Paris", 0.0)],
)
def test_exact_match_forgives_only_the_white_space_around(prediction: str, reference: str, score: float) -> None:
    assert m.exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The Eiffel  Tower!", "eiffel tower", 1.0),
        ("ﬁne", "fine", 1.0),  # NFKC: the ligature
        ("Ｐａｒｉｓ", "paris", 1.0),  # NFKC: full width
        ("STRASSE", "straße", 1.0),
        ("„Paris“ …", "Paris", 1.0),  # punctuation outside ASCII
        ("theory", "ory", 0.0),  # articles are words, not letters
        ("a", "A", 1.0),
        ("the", "A", 0.0),  # the reference is an article itself: an article alone must not match another
        ("B", "A", 0.0),
        ("", "A", 0.0),
        ("$", "%", 0.0),
        ("%", "%", 1.0),
        ("", "", 1.0),
        ("x", "", 0.0),
    ],
)
def test_normalized_match_follows_squad_and_never_empties_the_reference(
    prediction: str, reference: str, score: float
) -> None:
    assert m.normalized_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("It is in PARIS, France", "paris,  france", 1.0),
        ("London", "Paris", 0.0),
        ("anything", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_contains_looks_for_the_reference_inside_the_answer(prediction: str, reference: str, score: float) -> None:
    assert m.contains(prediction, reference) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples and 5 pears, so 8.", "8"),
        ("work 1\n#### 42", "42"),
        ("#### 42\nThat took 3 steps.", "42"),  # the marked number, not the last one
        ("#### 1\n#### 2", "2"),
        ("#### Step 2: add\nThe answer is 7", "7"),  # a heading is no mark
        ("#### $1,234.50", "1234.50"),
        ("$1,234,567", "1234567"),
        ("1\u202f234", "1234"),
        ("1'234", "1234"),
        ("1, 2", "2"),
        ("1,25", "25"),
        ("-5", "-5"),
        ("= \u22125", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("10-5", "5"),
        ("5 - 3", "3"),
        ("(3)-2", "2"),
        ("+7", "7"),
        ("0.50 euros", "0.5"),
        (".5", "0.5"),
        ("It costs 12.", "12"),
        ("15%", "15"),
        ("€ 20", "20"),
        ("20€.", "20"),
        ("2e3", "2000"),
        ("version 1.2.3", "3"),
        ("\\boxed{42}", "42"),
        ("10 m²", "10"),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text: str, number: str) -> None:
    assert m.last_number(text) == Decimal(number)


def test_number_match_compares_values_and_not_spellings() -> None:
    assert m.number_match("so 1,000.0 in all", "work 5\n#### 1000") == 1.0
    assert m.number_match("1000.01", "#### 1000") == 0.0
    assert m.number_match("no idea", "#### 1000") == 0.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_any_formatted_amount_is_read_back(value: Decimal) -> None:
    assert m.last_number(f"The total is {value:,} dollars.") == value


@given(st.text())
def test_no_text_breaks_the_number_reader(text: str) -> None:
    found = m.last_number(text)
    assert found is None or found.is_finite()


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        ("number_match", "none here", "holds no number"),
        ("json_exact", "{'a': 1}", "not JSON"),
        ("json_fields", "[1]", "not a JSON object"),
        ("json_fields", "{}", "not a JSON object"),
        ("regex:(\\d+)", "none here", "finds nothing"),
    ],
)
def test_a_reference_that_a_metric_cannot_use_is_an_error_and_not_a_zero(
    metric: str, reference: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        m.score(metric, "anything", reference)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("pattern", "prediction", "reference", "score"),
    [
        (r"answer: (\w+)", "the answer: yes!", "answer: yes", 1.0),
        (r"answer: (\w+)", "the answer: no!", "answer: yes", 0.0),
        (r"answer: (\w+)", "yes", "answer: yes", 0.0),
        (r"[A-D]\b", "B because", "B", 1.0),
        (r"(x)|y", "y", "x", 0.0),  # the group took no part in the match
    ],
)
def test_regex_compares_group_one_or_the_whole_match(
    pattern: str, prediction: str, reference: str, score: float
) -> None:
    assert m.score(f"regex:{pattern}", prediction, reference) == {f"regex:{pattern}": score}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        (' [1, 2.5e3, null, true, "x"]\n', True),
        ('"text"', True),
        ("{'a': 1}", False),
        ('{"a": 1,}', False),
        ('{"a": NaN}', False),
        ('{"a": Infinity}', False),
        ('{"a": 1, "a": 2}', False),
        ('{"a": 1} and more', False),
        ('```json\n{"a": 1}\n```', False),
        ("", False),
        ("[" * 100_000, False),
        ("9" * 5000, False),  # beyond Python's limit for integers: counted as unreadable, not a crash
    ],
)
def test_json_valid_is_strict(text: str, valid: bool) -> None:
    assert json_valid(text) == float(valid)


def test_a_fenced_block_is_json_only_on_request() -> None:
    block = '```json\n{"a": 1}\n```'
    assert json_valid(block) == 0.0
    assert json_valid(block, fenced=True) == 1.0
    assert json_valid("Here:\n" + block, fenced=True) == 0.0
    assert parse_strict(block, fenced=True) == {"a": 1}


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ('{"b": [1, {"c": null}], "a": "x"}', '{"a":"x","b":[1,{"c":null}]}', 1.0),
        ('{"a": 1.50}', '{"a": 1.5}', 1.0),
        ('{"a": 1}', '{"a": 1.0}', 0.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a": 0}', '{"a": false}', 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ("[1]", "[1, 1]", 0.0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0.0),
        ('{"a": 1', '{"a": 1}', 0.0),
        ('"caf\\u00e9"', '"café"', 1.0),
    ],
)
def test_json_exact_ignores_key_order_and_spelling_but_no_type(prediction: str, reference: str, score: float) -> None:
    assert json_exact(prediction, reference) == score


def test_json_fields_scores_each_field_of_the_reference_and_their_mean() -> None:
    reference = '{"name": "Ann", "amount": 12.5, "date": null}'
    found = json_fields('{"name": "Ann", "amount": "12.5", "date": null, "more": 1}', reference)
    assert found == {
        "json_fields": pytest.approx(2 / 3),
        "json_fields.name": 1.0,
        "json_fields.amount": 0.0,
        "json_fields.date": 1.0,
    }


@pytest.mark.parametrize("answer", ["no json", "[]", "null", "{}"])
def test_an_answer_without_the_fields_has_them_all_wrong_even_null_ones(answer: str) -> None:
    assert set(json_fields(answer, '{"a": 1, "b": null}').values()) == {0.0}


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat", "a cat sat down", 0.8),  # 2 shared of 2 and 3 words: P = 1, R = 2/3
        ("cat cat", "cat", 2 / 3),  # a repeated word counts once
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_is_squads(prediction: str, reference: str, score: float) -> None:
    assert m.token_f1(prediction, reference) == pytest.approx(score)


def test_rouge_l_agrees_with_the_library_on_plain_english() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    left, right = "The quick brown fox, it jumps over 2 dogs!", "A quick fox jumped over the 2 lazy dogs."
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(right, left)["rougeL"].fmeasure
    assert 0 < expected < 1
    assert m.rouge_l(left, right) == expected


@pytest.mark.parametrize("text", ["η γάτα κάθισε", "猫が座った", "кот сел на коврик"])
def test_rouge_l_sees_scripts_that_the_library_drops(text: str) -> None:
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    assert m.rouge_l(text, text) == 1.0
    assert 0 < m.rouge_l(text[: len(text) // 2], text) < 1


def test_rouge_l_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    m._rouge_scorer.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match="rouge-score") as caught:
        m.rouge_l("a", "a")
    assert "veneer[eval]" in str(caught.value.fix)


@given(st.text(), st.text())
def test_every_text_metric_stays_between_zero_and_one_and_gives_equal_texts_one(left: str, right: str) -> None:
    for metric in (m.exact_match, m.normalized_match, m.contains, m.token_f1):
        assert 0.0 <= metric(left, right) <= 1.0
        assert metric(left, left) == 1.0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("exactmatch", "exact_match"),
        ("Rouge-L", "rouge_l"),
        ("regex", "regex:PATTERN"),
        ("regex:", "regex:PATTERN"),
        ("bleurt-20", "use one of"),
    ],
)
def test_an_unknown_metric_names_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="unknown metric") as caught:
        m.resolve_metric(name)
    assert hint in str(caught.value.fix)


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        m.resolve_metric("regex:(")


def test_metrics_are_named_once_and_at_least_one() -> None:
    with pytest.raises(UsageError, match="stands twice"):
        m.resolve_metrics(["exact_match", "exact_match"])
    with pytest.raises(UsageError, match="no metric"):
        m.resolve_metrics([])
    assert [metric.name for metric in m.resolve_metrics(["token_f1", "perplexity"])] == ["token_f1", "perplexity"]


def test_perplexity_is_not_scored_from_text() -> None:
    with pytest.raises(UsageError, match="log-probabilities"):
        m.score("perplexity", "a", "a")
