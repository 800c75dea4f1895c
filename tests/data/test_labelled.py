"""Labelled rows: which columns they are read from, what a label is, the classes they make, the tokens they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from classifiers import write_tokenizer
from veneer.data.classes import find_classes
from veneer.data.conversation import Rows
from veneer.data.label_render import render_labelled
from veneer.data.labelled import LabelledRow
from veneer.data.read import read
from veneer.data.split import split
from veneer.errors import DataError, UsageError


def rows_of(*labels: Any, **more: Any) -> Rows:
    return read([{"text": f"text {n}", "label": label, **more} for n, label in enumerate(labels)], format="labelled")


def labels_in(rows: Rows) -> list[str | None]:
    return [row.label for row in rows if isinstance(row, LabelledRow)]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "a", "label": "x"}, None, ("a", None, "x")),
        ({"review": "a", "sentiment": 1}, None, ("a", None, "1")),
        ({"sentence1": "a", "sentence2": "b", "label": "x", "idx": 3}, None, ("a", "b", "x")),
        ({"premise": "a", "hypothesis": "b"}, None, ("a", "b", None)),
        ({"subject": "a", "queue": "x", "label": "y"}, {"text": "subject", "label": "queue"}, ("a", None, "x")),
        ({"text": 5, "label": True}, None, ("5", None, "true")),
        ({"text": "a", "label": 2.0}, None, ("a", None, "2")),
        ({"text": "a", "label": " x "}, None, ("a", None, "x")),
        ({"text": "a", "label": ""}, None, ("a", None, None)),
    ],
)
def test_text_pair_and_label_are_found(
    row: dict[str, Any], columns: dict[str, str] | None, expected: tuple[str, str | None, str | None]
) -> None:
    (found,) = read([row], format="labelled", columns=columns).conversations
    assert isinstance(found, LabelledRow)
    assert (found.text, found.pair, found.label) == expected


def test_what_is_read_and_what_is_not_is_said() -> None:
    rows = read([{"sentence": "a", "label": "x", "idx": 3}], format="labelled")
    assert rows.description.endswith("read as labelled (text: 'sentence', label: 'label'); not used: 'idx'")


@pytest.mark.parametrize(
    ("row", "columns", "error", "message"),
    [
        ({"body": "a", "label": "x"}, None, DataError, "none of the columns 'body', 'label' is known to hold the text"),
        ({"text": "a", "label": 1, "category": 2}, None, DataError, "'label', 'category' could be the label"),
        ({"text": "a"}, {"labl": "text"}, UsageError, "unknown field 'labl'"),
        ({"text": "a"}, {"label": "lable"}, UsageError, "there is no column 'lable'"),
        ({"text": None, "label": "x"}, None, DataError, "column 'text' holds nothing, not text"),
        ({"text": "a", "label": 0.5}, None, DataError, "a number with a fraction"),
        ({"text": "a", "label": {"a": 1}}, None, DataError, "the label is dict"),
    ],
)
def test_rows_that_are_not_understood_are_refused(
    row: dict[str, Any], columns: dict[str, str] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read([row], format="labelled", columns=columns)


def test_a_table_of_texts_and_labels_is_never_guessed_to_be_labelled() -> None:
    with pytest.raises(DataError, match="raw text, or texts to be labelled"):
        read([{"text": "a", "label": "x"}])


def test_the_same_text_stays_on_one_side_of_a_split_whatever_its_label() -> None:
    rows = read([{"text": f"Text {n // 2}", "label": n % 2} for n in range(20)], format="labelled")
    train, held_out = split(rows, 6, seed=0)
    assert {row.group for row in train}.isdisjoint(row.group for row in held_out)
    assert len(held_out) == 6
    assert read([{"text": "a", "label": 1}], format="labelled").content_hash != (
        read([{"text": "a", "label": 2}], format="labelled").content_hash
    )


def test_classes_stand_in_the_order_of_their_numbers_or_of_the_alphabet() -> None:
    assert find_classes(rows_of("b", "a", "B"), None).names == ("B", "a", "b")
    assert find_classes(rows_of(10, 9, "-1"), None).names == ("-1", "9", "10")
    assert find_classes(rows_of("x", "y", "x"), None, ["y", "z", "x"]).counts == (1, 0, 2)
    assert find_classes(rows_of(1, 0, "yes"), None, ["no", "yes"]).counts == (1, 2), "a number counts the given names"


def test_the_majority_is_the_baseline() -> None:
    classes = find_classes(rows_of("a", "b", "b"), rows_of("a", "b", "a", "a"))
    assert classes.majority == "b"
    assert classes.majority_accuracy == 0.25
    assert "'b', the most frequent one, has 66.7% of the training rows and 25.0% of the held-out ones" in str(classes)
    assert find_classes(rows_of("a", "b"), None).majority_accuracy is None


@pytest.mark.parametrize(
    ("train", "held_out", "given", "message", "fix"),
    [
        (["a", None, "b"], None, None, "1 of 3 rows have no label", "label them"),
        (["a", "a"], None, None, "all 2 training rows have the label 'a'", "at least two classes"),
        (["a", "a"], None, ["a", "b"], "all 2 training rows have the label 'a'", "at least two classes"),
        (["warm", "cold"], ["wram"], None, "'wram' occurs only in the held-out rows", "Did you mean 'warm'?"),
        (["a", "b"], ["b", None], None, "1 of 2 rows have no label", "label them"),
        (["warm", "cold"], None, ["warm", "cool"], "'cold' is none of data.labels", "Did you mean 'cool'?"),
        ([0, 1, 2], None, ["no", "yes"], "'2' is none of data.labels", "add it to data.labels"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(
    train: list[Any], held_out: list[Any] | None, given: list[str] | None, message: str, fix: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_classes(rows_of(*train), None if held_out is None else rows_of(*held_out), given)
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    ("train", "held_out", "given", "warning"),
    [
        (["a", "b"], None, ["a", "b", "c"], "no training row has the label 'c'"),
        (["a", "b", "A"], None, None, "differ in case or white space alone"),
        (["a"] * 10 + ["b"], None, None, "10 training rows of 'a' and 1 of 'b'"),
        (["a", "b"], ["a"], None, "no held-out row has the label 'b'"),
    ],
)
def test_what_deserves_a_look_is_said(
    train: list[Any], held_out: list[Any] | None, given: list[str] | None, warning: str
) -> None:
    classes = find_classes(rows_of(*train), None if held_out is None else rows_of(*held_out), given)
    (said,) = classes.warnings
    assert warning in said


def test_rows_of_another_shape_are_refused() -> None:
    rows = read([{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="1 of 1 rows have no text with a label: they are prompt-completion rows"):
        find_classes(rows, None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    made = {framed: write_tokenizer(tmp_path_factory.mktemp("t"), framed=framed) for framed in (True, False)}
    return lambda framed: made[framed]


def ids_of(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def test_a_row_gets_the_tokenizers_own_frame(tokenizer: Callable[[bool], Any]) -> None:
    framed, bare = tokenizer(True), tokenizer(False)
    rows = read(
        [{"text": "ab", "pair": "c", "label": "x"}, {"text": "d", "pair": "e", "label": "y"}], format="labelled"
    )
    dataset = render_labelled(rows, framed, ["x", "y"], max_length=None)
    a, c = ids_of("ab", framed), ids_of("c", framed)
    assert dataset.row(0).input_ids.tolist() == [1, *a, 2, *c, 2]
    assert dataset.token_types[:6].tolist() == [0, 0, 0, 0, 1, 1]
    assert dataset.classes.tolist() == [0, 1]
    # Without a separator the texts would run together.
    assert render_labelled(rows, bare, ["x", "y"], max_length=None).row(0).input_ids.tolist() == ids_of("ab\nc", bare)


def test_truncation_keeps_the_frame_and_counts_every_token(tokenizer: Callable[[bool], Any]) -> None:
    framed = tokenizer(True)
    rows = read(
        [{"text": "abcdefgh", "pair": "xy", "label": 0}, {"text": "abc", "pair": "x", "label": 1}], format="labelled"
    )
    dataset = render_labelled(rows, framed, ["0", "1"], max_length=9)
    assert dataset.row(0).input_ids.tolist() == [1, *ids_of("abcd", framed), 2, *ids_of("xy", framed), 2]
    assert dataset.stats.truncated_rows == 1
    assert dataset.stats.truncated_tokens == 4
    assert dataset.stats.tokens == 9 + 7
    assert "truncated 1 of 2 rows to max_length 9: 4 tokens lost (20.0% of all)" in dataset.stats.warnings
    dropped = render_labelled(rows, framed, ["0", "1"], max_length=9, overlong="drop")
    assert dropped.row_ids == ["row:2"]
    assert dropped.classes.tolist() == [1]
    with pytest.raises(DataError, match="1 rows longer than max_length 9"):
        render_labelled(rows, framed, ["0", "1"], max_length=9, overlong="error")
    with pytest.raises(DataError, match="leaves no room for text"):
        render_labelled(rows, framed, ["0", "1"], max_length=3)


def test_rows_without_text_are_left_out_and_named(tokenizer: Callable[[bool], Any]) -> None:
    rows = read([{"text": "  ", "label": "x"}, {"text": "a", "label": "y"}], format="labelled")
    dataset = render_labelled(rows, tokenizer(True), ["x", "y"], max_length=None)
    assert dataset.row_ids == ["row:2"]
    assert dataset.stats.warnings == ["left out 1 rows (no text): row:1"]
    with pytest.raises(DataError, match="no row is left"):
        render_labelled(rows.subset([0], ""), tokenizer(True), ["x", "y"], max_length=None)


def test_a_label_that_the_model_does_not_know_is_refused(tokenizer: Callable[[bool], Any]) -> None:
    with pytest.raises(DataError, match="the label 'z' is none of the classes"):
        render_labelled(rows_of("z"), tokenizer(True), ["x", "y"], max_length=None)


def test_lines_of_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in ("x", None)))
    with pytest.raises(DataError) as caught:
        find_classes(read(path, format="labelled"), None)
    assert caught.value.where == "rows.jsonl:2"
