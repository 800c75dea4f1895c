"""Packing and collating, as properties that hold for any rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from data_families import family
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data import Example, best_fit_decreasing, collate_packed, collate_padded
from veneer.data.pack import IGNORE_INDEX, Batch, pad_id_of
from veneer.errors import UsageError

PAD = 3  # also an ordinary id of the rows below: padding must be known by length alone


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """One to six documents of one to twelve tokens, ids 0 to 9, any mask whose first token is not trained."""
    found = []
    for number in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        found.append(Example(np.array(ids, np.int32), np.array([False, *mask[1:]]), f"row:{number}"))
    return found


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_every_row_is_in_exactly_one_bin_and_no_bin_is_too_full(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(index for bin in bins for index in bin) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in bin) <= capacity for bin in bins)


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_the_bins_are_near_the_fewest_possible(lengths: list[int], capacity: int) -> None:
    # Johnson et al. 1974: 11/9 of the optimum plus 4. The optimum is not known here, but is at least the total over the
    # capacity, and any two bins that are at most half full would have been one.
    bins = best_fit_decreasing(lengths, capacity)
    fill = sorted(sum(lengths[index] for index in bin) for bin in bins)
    assert all(a + b > capacity for a, b in itertools.pairwise(fill))
    assert len(bins) <= max(1, 2 * -(-sum(lengths) // capacity)) if lengths else not bins


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 64))
def test_it_is_best_fit_decreasing_as_written_in_the_textbook(lengths: list[int], capacity: int) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= length
        else:
            rooms.append(capacity - length)
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(capacity - sum(lengths[index] for index in bin) for bin in bins) == sorted(rooms)


def test_a_set_that_fits_without_a_gap_is_packed_without_a_gap() -> None:
    lengths = [7, 3, 5, 5, 6, 4, 10, 8, 2, 9, 1] * 30
    assert len(best_fit_decreasing(lengths, 10)) == sum(lengths) // 10


def test_the_same_lengths_give_the_same_bins_whatever_their_type() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 100, 500)]
    once = best_fit_decreasing(lengths, 128)
    assert once == best_fit_decreasing(np.array(lengths), 128)  # type: ignore[arg-type]  # an array works as well
    assert next(index for bin in once for index in bin) == lengths.index(max(lengths))


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([4, 11], 10, "row 1 has 11 tokens, more than a bin of 10"),
        ([4, 0], 10, "row 1 has no tokens"),
        ([4], 0, "a bin of 0 tokens"),
    ],
)
def test_rows_that_cannot_be_packed_are_refused(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        best_fit_decreasing(lengths, capacity)


def test_no_rows_give_no_bins() -> None:
    assert best_fit_decreasing([], 10) == []


def expected_triples(rows: list[Example]) -> list[tuple[str, int, int, int]]:
    """(row, input id, position, id to predict) for each trained token, straight from the definition."""
    return [
        (row.row_id, int(row.input_ids[t - 1]), t - 1, int(row.input_ids[t]))
        for row in rows
        for t in range(1, len(row))
        if row.trained[t]
    ]


def triples(batch: Batch) -> list[tuple[str, int, int, int]]:
    """The same, from a batch's tensors."""
    places: list[tuple[str, int, int]] = []
    if batch.document_lengths is not None:
        start = 0
        for row_id, length in zip(batch.row_ids, batch.document_lengths):
            places += [(row_id, 0, t) for t in range(start, start + length)]
            start += length
        assert start == batch.input_ids.shape[1]
    else:
        assert batch.lengths is not None
        places = [(row_id, b, t) for b, row_id in enumerate(batch.row_ids) for t in range(batch.lengths[b])]
        outside = torch.ones_like(batch.targets, dtype=torch.bool)
        for _, b, t in places:
            outside[b, t] = False
        assert (batch.targets[outside] == IGNORE_INDEX).all()
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, ~outside)
    return [
        (row_id, int(batch.input_ids[b, t]), int(batch.position_ids[b, t]), int(batch.targets[b, t]))
        for row_id, b, t in places
        if batch.targets[b, t] != IGNORE_INDEX
    ]


@settings(max_examples=200)
@given(examples())
def test_packed_and_padded_batches_train_the_same_things_at_the_same_positions(rows: list[Example]) -> None:
    packed, padded, expected = collate_packed(rows), collate_padded(rows, PAD), expected_triples(rows)
    assert triples(packed) == triples(padded) == expected
    for batch in (packed, padded):
        assert batch.trained_tokens == len(expected) == sum(int(row.trained.sum()) for row in rows)
        assert batch.tokens == sum(len(row) for row in rows)
        assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.targets)} == {torch.int64}


@given(examples())
def test_no_target_crosses_into_the_next_document(rows: list[Example]) -> None:
    batch = collate_packed(rows)
    ends = np.cumsum(batch.document_lengths) - 1
    assert (batch.targets[0, ends] == IGNORE_INDEX).all()
    assert batch.position_ids[0].tolist() == [t for row in rows for t in range(len(row))]
    assert batch.input_ids.shape[0] == 1


@given(examples())
def test_padding_stands_on_the_right_and_nowhere_else(rows: list[Example]) -> None:
    batch = collate_padded(rows, PAD)
    for b, row in enumerate(rows):
        assert batch.input_ids[b, : len(row)].tolist() == row.input_ids.tolist()
        assert (batch.input_ids[b, len(row) :] == PAD).all()


def test_a_first_token_is_never_a_target_even_where_its_mask_says_so() -> None:
    rows = [Example(np.array([5, 6], np.int32), np.array([True, True]), "a")] * 2
    assert collate_packed(rows).targets.tolist() == [[6, IGNORE_INDEX, 6, IGNORE_INDEX]]


def test_a_batch_of_nothing_is_refused() -> None:
    empty = Example(np.zeros(0, np.int32), np.zeros(0, np.bool_), "row:9")
    with pytest.raises(UsageError, match="at least one example"):
        collate_packed([])
    with pytest.raises(UsageError, match="row:9 has no tokens"):
        collate_padded([empty], PAD)


def test_the_pad_id_is_the_tokenizers_or_zero() -> None:
    assert pad_id_of(family("qwen25")) == family("qwen25").convert_tokens_to_ids("<|endoftext|>")
    assert family("llama3").pad_token_id is None
    assert pad_id_of(family("llama3")) == 0


def test_a_batch_moves_whole() -> None:
    batch = collate_packed([Example(np.array([5, 6], np.int32), np.array([False, True]), "a")])
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.targets)} == {"meta"}
    assert (moved.row_ids, moved.trained_tokens, moved.document_lengths) == (["a"], 1, [2])
