"""The record of an evaluation: its file, its table, its sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.errors import DataError, UsageError
from veneer.evaluate import Evaluation, MetricResult, RowResult
from veneer.evaluate.evaluation import format_difference, format_value, label
from veneer.files import write_json

UP = MetricResult(0.9, 0.85, 0.95, 0.1, 0.8, 0.72, 0.87, 0.05, 0.15, rows=200)
FLAT = MetricResult(0.5, 0.4, 0.6, 0.49, 0.01, -0.05, 0.07, 0.4, 0.6, rows=200)
PERPLEXITY = MetricResult(2.5, 2.4, 2.6, 4.0, -1.5, -1.7, -1.3, 3.9, 4.1, rows=200, higher_is_better=False)
ROW = RowResult("rows.jsonl:1", "p", "r", "a", "b", {"json_exact": 1.0}, {"json_exact": 0.0}, "stop", "length")


def an_evaluation() -> Evaluation:
    return Evaluation(
        metrics={"json_valid": UP, "contains": FLAT, "perplexity": PERPLEXITY},
        rows=[ROW],
        data_source="rows.jsonl",
        max_new_tokens=64,
        resamples=10_000,
    )


def test_an_evaluation_survives_its_file_in_the_order_of_its_metrics(tmp_path: Path) -> None:
    found = an_evaluation()
    assert Evaluation.load(found.save(tmp_path / "eval" / "x.json")) == found
    write_json(tmp_path / "sorted.json", found.to_dict())  # another writer, which sorts the keys
    assert list(Evaluation.load(tmp_path / "sorted.json").metrics) == ["json_valid", "contains", "perplexity"]


def test_a_lone_surrogate_from_json_data_does_not_stop_the_writing(tmp_path: Path) -> None:
    found = replace(an_evaluation(), rows=[replace(ROW, prompt="broken \ud83d emoji")])
    assert Evaluation.load(found.save(tmp_path / "x.json")).rows[0].prompt == "broken ? emoji"


def test_damaged_files_are_refused_with_their_name(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = an_evaluation().to_dict()
    for broken, message in (
        ("{", "not JSON"),
        ("[]", "no evaluation"),
        (json.dumps({**value, "format": "other"}), "no evaluation"),
        (json.dumps({**value, "surprise": 1}), "damaged"),
        (json.dumps({key: item for key, item in value.items() if key != "rows"}), "damaged"),
        (json.dumps({**value, "metrics": {}, "order": []}), "damaged"),
    ):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=message) as caught:
            Evaluation.load(path)
        assert caught.value.where == str(path)


def test_the_verdict_says_before_after_and_interval() -> None:
    found = an_evaluation()
    assert found.verdict() == (
        "Valid JSON on 200 held-out rows rose from 10.0 % to 90.0 % (+80.0 points, 95 % interval +72.0 to +87.0)."
    )
    assert found.verdict("perplexity") == (
        "Perplexity on 200 held-out rows fell from 4.00 to 2.50 (−1.50, 95 % interval −1.70 to −1.30)."
    )
    assert found.verdict("contains").endswith(": no clear difference.")
    same = replace(FLAT, base_value=0.5, difference=0.0, difference_low=0.0, difference_high=0.0)
    assert Evaluation({"contains": same}, [ROW]).verdict() == (
        "Containment on 200 held-out rows is 50.0 % before and after: no row's score changed."
    )
    alone = replace(UP, base_value=None, difference=None, difference_low=None, difference_high=None)
    assert Evaluation({"json_valid": alone}, [ROW]).verdict() == (
        "Valid JSON on 200 held-out rows is 90.0 % (95 % interval 85.0 % to 95.0 %)."
    )


def test_better_and_worse_follow_the_metrics_own_direction() -> None:
    assert (UP.verdict, FLAT.verdict, PERPLEXITY.verdict) == ("better", "unclear", "better")
    assert replace(UP, higher_is_better=False).verdict == "worse"
    assert replace(PERPLEXITY, higher_is_better=True).verdict == "worse"
    assert replace(UP, difference_low=None).verdict == ""


def test_a_metric_that_was_not_measured_has_no_verdict() -> None:
    with pytest.raises(UsageError, match="not measured") as caught:
        an_evaluation().verdict("json_vaild")
    assert "json_valid" in str(caught.value.fix)


def test_the_table_shows_all_numbers_and_what_was_cut() -> None:
    text = str(an_evaluation())
    for part in ("json_valid", "10.0 %", "90.0 %", "+80.0", "+72.0 to +87.0", "4.00", "−1.50", "1 row of rows.jsonl"):
        assert part in text
    assert "1 answer cut at 64 tokens: 0 of the adapter's, 1 of the base's" in " ".join(text.split())
    assert "\x1b" not in text


def test_a_metric_of_very_many_fields_does_not_flood_the_table() -> None:
    metrics = {"json_fields": UP, **{f"json_fields.field{n}": UP for n in range(100)}, "json_exact": UP}
    text = str(Evaluation(metrics, [ROW]))
    assert ".field19" in text
    assert ".field20" not in text
    assert "json_exact" in text
    assert "80 more fields" in text


def test_markup_in_a_pattern_is_shown_as_it_is() -> None:
    assert "[bold]x" in str(Evaluation({"regex:[bold]x": UP}, [ROW]))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0"), (-0.0, "0.0"), (0.0004, "0.0"), (-0.0004, "0.0"), (-0.012, "−1.2"), (1.0, "+100.0")],
)
def test_differences_carry_a_sign_only_where_there_is_a_difference(value: float, text: str) -> None:
    assert format_difference("exact_match", value) == text


def test_numbers_and_names_are_written_for_people() -> None:
    assert format_value("perplexity", 1e9) == "1e+09"
    assert format_value("perplexity", 1234.5) == "1,234.50"
    assert format_value("token_f1", 0.1234) == "12.3 %"
    assert label("json_fields.order") == "JSON field accuracy.order"
    assert label("regex:a.b") == "Match at /a.b/"
