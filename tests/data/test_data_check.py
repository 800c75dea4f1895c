"""The quality report: each defect is found, counted, and named by its rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_families import family

from veneer.data import CheckReport, Rows, check, read
from veneer.errors import UsageError


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def found(report: CheckReport) -> dict[str, tuple[str, int, list[str]]]:
    return {p.code: (p.severity, p.count, p.row_ids) for p in report.problems}


U, A = ("user", "Hi there"), ("assistant", "Hello!")
CLEAN = read([chat(U, A), chat(("user", "Name a fruit."), ("assistant", "Fig."))])


def test_clean_rows_have_no_problems_and_leave_with_0() -> None:
    report = check(CLEAN, family("chatml"), max_length=512)
    assert report.problems == []
    assert (report.rows, report.messages, report.exit_status) == (2, {"user": 2, "assistant": 2}, 0)
    assert str(report).endswith("no problems found")


@pytest.mark.parametrize(
    ("row", "code", "severity"),
    [
        (chat(U), "no_assistant", "error"),
        (chat(U, ("assistant", "  ")), "nothing_said", "error"),
        (chat(U, ("assistant", ""), U, A), "empty_answer", "warning"),
        (chat(("user", " "), A), "empty_prompt", "warning"),
        (chat(U, U, A), "same_role_twice", "warning"),
        (chat(U, ("system", "x"), A), "late_system", "warning"),
        (chat(U, A, U), "ends_unanswered", "warning"),
    ],
)
def test_a_defect_is_found_without_a_tokenizer(row: dict[str, Any], code: str, severity: str) -> None:
    report = check(read([*[chat(("user", f"q{n}"), A) for n in range(3)], row]))
    assert found(report) == {code: (severity, 1, ["row:4"])}
    assert report.exit_status == (1 if severity == "error" else 0)
    assert f"{severity}: 1 row" in str(report)


def test_empty_text_rows_are_errors() -> None:
    report = check(read([{"text": "once"}, {"text": " "}]))
    assert found(report) == {"empty_text": ("error", 1, ["row:2"])}


def test_duplicates_are_counted_and_the_repeats_named() -> None:
    rows = read([chat(U, A), chat(("user", "q"), A), chat(U, A), chat(U, A), chat(U, ("assistant", "Other"))])
    report = check(rows)
    assert (report.exact_duplicates, report.same_prompt_rows) == (2, 4)
    assert found(report) == {"duplicate": ("warning", 2, ["row:3", "row:4"])}


def test_evaluation_rows_that_training_has_seen_are_found() -> None:
    held = read([chat(U, A), chat(("user", "hi  THERE"), ("assistant", "Other")), chat(("user", "new"), A)])
    report = check(CLEAN, eval_rows=held)
    assert report.overlap == {"rows": 3, "exact": 1, "same_prompt": 2}
    assert found(report) == {
        "eval_in_train": ("error", 1, ["row:1"]),
        "eval_prompt_in_train": ("warning", 1, ["row:2"]),
    }


def test_only_the_first_few_rows_are_named() -> None:
    report = check(read([chat(("user", f"q{n}")) for n in range(30)]))
    assert found(report)["no_assistant"] == ("error", 30, [f"row:{n}" for n in range(1, 6)])
    assert "row:5, ...)" in str(report)


def test_lengths_are_those_of_the_rendered_rows_and_the_cut_is_counted() -> None:
    from veneer.data import render

    tokenizer = family("chatml")
    rows = read([chat(("user", f"q{n}"), ("assistant", "hello " * n)) for n in range(1, 101)])
    lengths = sorted(render(rows, tokenizer, max_length=None).lengths.tolist())
    report = check(rows, tokenizer, max_length=100)
    assert report.tokens is not None
    assert report.tokens["total"] == sum(lengths)
    assert report.tokens["percentiles"] == {
        "50": lengths[50], "90": lengths[90], "95": lengths[95], "99": lengths[99], "100": lengths[99],
    }  # fmt: skip
    over = [length for length in lengths if length > 100]
    lost = sum(over) - 100 * len(over)
    assert report.tokens["cut"]["100"] == {"rows": len(over), "tokens": lost, "share": lost / sum(lengths)}
    assert found(report)["overlong"][1] == len(over) > 0
    assert f"max_length 100 would cut {len(over)} rows and {lost:,} tokens" in str(report)


def test_an_answer_that_max_length_cuts_away_is_an_error() -> None:
    rows = read([chat(("user", "Hi there " * 50), A), chat(U, A)])
    report = check(rows, family("chatml"), max_length=60)
    assert found(report)["answer_cut_away"] == ("error", 1, [])
    with pytest.raises(UsageError, match="max_length is 0"):
        check(rows, family("chatml"), max_length=0)


def test_rows_that_cannot_be_masked_and_rows_without_labels_are_errors() -> None:
    rows = read([chat(U, A), chat(("system", "x"), U, A), chat(U)])
    report = check(rows, family("gemma"))
    assert found(report)["refused"] == ("error", 1, ["row:2"])
    assert "System role not supported" in str(report)
    assert found(report)["no_labels"] == ("error", 1, ["row:3"])
    assert report.exit_status == 1


def test_control_tokens_in_the_text_are_a_warning() -> None:
    report = check(read([chat(("user", "Say <|im_end|>"), A)]), family("chatml"))
    assert found(report) == {"control_tokens": ("warning", 1, ["row:1"])}


def test_rows_that_run_together_without_a_template_are_a_warning() -> None:
    rows: Rows = read([{"prompt": "Q: a", "completion": "b"}, {"prompt": "Q: a\n", "completion": "b"}])
    assert found(check(rows, family("plain")))["glued"] == ("warning", 1, ["row:1"])
    assert "glued" not in found(check(rows, family("chatml")))


def test_an_answer_is_lost_when_its_first_token_is_the_first_one_cut() -> None:
    from veneer.data import render

    first = int(render(CLEAN, family("chatml"), max_length=None).row(0).trained.argmax())
    only = Rows(CLEAN.conversations[:1], "messages", "one", "one row")
    assert "answer_cut_away" in found(check(only, family("chatml"), max_length=first))
    assert "answer_cut_away" not in found(check(only, family("chatml"), max_length=first + 1))


def test_a_trained_part_without_a_stop_token_is_an_error() -> None:
    # With the prompt trained too, Mistral's user turn has tokens to learn and nothing that ends it.
    rows = read([chat(U, A), chat(("user", "No answer here"))])
    assert found(check(rows, family("mistral"), train_on="prompt-too"))["no_stop"] == ("error", 1, ["row:2"])
    assert "no_stop" not in found(check(CLEAN, family("mistral")))


def test_the_report_is_json() -> None:
    report = check(read([chat(U, A), chat(U)]), family("chatml"), max_length=20, eval_rows=CLEAN)
    value = json.loads(json.dumps(report.to_dict()))
    assert value["rows"] == 2
    assert value["exit_status"] == 1
    assert {p["code"] for p in value["problems"]} >= {"no_assistant", "eval_in_train"}
    assert value["tokens"]["cut"]["20"]["rows"] >= 1
