"""The held-out split: near the asked share, the same every time, and nothing on both sides."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data import Rows, read, split
from veneer.errors import DataError, UsageError


def rows_of(prompts: list[str]) -> Rows:
    return read([{"prompt": prompt, "completion": f"answer {number}"} for number, prompt in enumerate(prompts)])


def prompts(rows: Rows) -> list[str]:
    return [row.messages[0].content for row in rows.conversations]


@given(st.lists(st.integers(0, 12), min_size=4, max_size=60), st.floats(0.05, 0.6), st.integers(0, 5))
def test_no_prompt_stands_on_both_sides_and_no_row_is_lost(numbers: list[int], share: float, seed: int) -> None:
    if len(set(numbers)) < 2 or max(1, round(share * len(numbers))) >= len(numbers):
        return
    rows = rows_of([f"  Prompt {number}".upper() if i % 2 else f"prompt  {number}" for i, number in enumerate(numbers)])
    train, held = split(rows, share, seed)
    assert len(train) >= 1
    assert len(held) >= 1
    assert not {r.group for r in train.conversations} & {r.group for r in held.conversations}
    ids = [r.row_id for r in rows.conversations]
    assert sorted([r.row_id for r in (*train.conversations, *held.conversations)]) == sorted(ids)
    for side in (train, held):
        assert [r.row_id for r in side.conversations] == [i for i in ids if i in {r.row_id for r in side.conversations}]


def test_the_share_is_met_exactly_where_prompts_differ() -> None:
    rows = rows_of([f"prompt {n}" for n in range(200)])
    for asked, expected in ((0.1, 20), (20, 20), (1, 1), (0.001, 1), (199, 199)):
        train, held = split(rows, asked, seed=0)
        assert (len(train), len(held)) == (200 - expected, expected)


def test_the_share_is_met_as_closely_as_whole_groups_allow() -> None:
    rows = rows_of([f"prompt {n // 4}" for n in range(200)])
    assert len(split(rows, 0.1, seed=0)[1]) == 20
    assert len(split(rows, 21, seed=0)[1]) == 20
    assert len(split(rows, 23, seed=0)[1]) == 24
    assert len(split(rows, 1, seed=0)[1]) == 4


def test_the_split_follows_the_content_and_the_seed_not_the_order() -> None:
    names = [f"prompt {n}" for n in range(100)]
    shuffled = random.Random(1).sample(names, k=100)
    held = set(prompts(split(rows_of(names), 0.2, seed=0)[1]))
    assert held == set(prompts(split(rows_of(shuffled), 0.2, seed=0)[1]))
    assert held != set(prompts(split(rows_of(names), 0.2, seed=1)[1]))
    # One more row moves at most one other.
    grown = set(prompts(split(rows_of([*names, "prompt new"]), 20, seed=0)[1]))
    assert len(held - grown) <= 1


def test_the_sides_say_where_they_come_from_and_have_hashes_of_their_own() -> None:
    rows = rows_of([f"prompt {n}" for n in range(10)])
    train, held = split(rows, 3, seed=7)
    assert "3 of 10 rows held out by prompt (seed 7)" in held.description
    assert "7 rows to train on" in train.description
    assert len({rows.content_hash, train.content_hash, held.content_hash}) == 3


@pytest.mark.parametrize("share", [0, -0.1, 10, 11, 2.5, True, "0.1"])
def test_a_share_that_cannot_be_held_out_is_a_usage_error(share: float) -> None:
    with pytest.raises(UsageError) as caught:
        split(rows_of([f"prompt {n}" for n in range(10)]), share, seed=0)
    assert caught.value.where == "data.eval"


def test_rows_that_all_share_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all 5 rows have the same prompt"):
        split(rows_of(["Tell me a joke."] * 5), 0.2, seed=0)
