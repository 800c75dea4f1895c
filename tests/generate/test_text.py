"""Text as its tokens come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.generate.text import TextSoFar


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


HALF = "\ufffd"  # cannot be told from half a character
STOPS = st.text(st.characters(exclude_characters=HALF, codec="utf-8"), min_size=1, max_size=4)


@given(st.text(min_size=1, max_size=30), st.lists(STOPS, max_size=3))
def test_pieces_make_up_the_text_before_the_first_stop(written: str, stops: list[str]) -> None:
    row = TextSoFar(decode_bytes, stops)
    heard, stopped = "", False
    data = written.encode("utf-8", errors="replace")
    for byte in data:
        stopped = row.push(byte)
        piece = row.fresh(last=stopped)
        heard += piece
        if stopped:
            break
    heard += row.fresh(last=True)
    assert heard == row.text
    assert not any(stop in heard for stop in stops)
    whole = data.decode()
    if not stopped:
        assert heard == whole
    else:
        # It ended as soon as a stop was complete, and right before it.
        assert whole.startswith(heard)
        assert any(whole[len(heard) :].startswith(stop) for stop in stops)


def test_half_a_character_waits_for_its_other_half() -> None:
    row = TextSoFar(decode_bytes)
    pieces = []
    for byte in "a日b".encode():
        row.push(byte)
        pieces.append(row.fresh())
    assert pieces == ["a", "", "", "日", "b"]


def test_half_a_character_is_no_stop() -> None:
    row = TextSoFar(decode_bytes, [HALF])
    assert [row.push(byte) for byte in "日b".encode()] == [False] * 4
    assert row.text == "日b"
    assert row.push(0xFF) is False  # a broken byte
    assert row.push(ord("c")) is True  # is one when something follows
    assert row.text == "日b"


def test_what_may_begin_a_stop_string_waits() -> None:
    row = TextSoFar(decode_bytes, ["\n\nUser:", "END"])
    pieces = []
    for byte in b"EN\nE\n\nUs!":
        row.push(byte)
        pieces.append(row.fresh())
    assert pieces == ["", "", "EN", "\n", "E", "", "", "", "\n\nUs!"]


def test_a_broken_end_is_shown_when_nothing_follows() -> None:
    row = TextSoFar(decode_bytes)
    for byte in "日".encode()[:2]:
        row.push(byte)
    assert row.fresh() == ""
    assert row.fresh(last=True) == "\ufffd"


@pytest.mark.parametrize(("stops", "text"), [(["b", "ab"], "x"), (["cd", "b"], "xa")])
def test_the_earliest_stop_counts(stops: list[str], text: str) -> None:
    # One token brings "abcd" as a whole: several stops are complete at once.
    row = TextSoFar(lambda ids: "xabcd"[: 1 + 4 * (len(ids) - 1)], stops)
    row.push(0)
    assert row.push(1)
    assert row.text == text
