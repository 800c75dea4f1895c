"""Rows to processes and micro-batches, and the noise that must not notice."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.dataset import Example, RenderStats, TokenDataset
from veneer.train.layout import Layout, deal, default_micro_batch_tokens, document_lengths, micro_batches
from veneer.train.noise import embedding_noise, neftune, stream_seed


def rows_of(lengths: list[int]) -> TokenDataset:
    examples = [
        Example(np.arange(1, n + 1, dtype=np.int32), np.arange(n) >= n // 2, f"f.jsonl:{i + 1}")
        for i, n in enumerate(lengths)
    ]
    return TokenDataset.from_examples(examples, RenderStats())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 5))
def test_every_row_is_dealt_once_and_processes_get_like_shares(lengths: list[int], world_size: int) -> None:
    hands = deal(range(len(lengths)), lengths, world_size)
    assert len(hands) == world_size
    assert sorted(i for hand in hands for i in hand) == list(range(len(lengths)))
    counts = [len(hand) for hand in hands]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[i] for i in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_dealing_looks_up_lengths_by_row_and_not_by_place() -> None:
    lengths = np.array([1, 1, 1, 9, 1, 8])
    assert [sorted(hand) for hand in deal([5, 0, 3, 2], lengths, 2)] == [[2, 3], [0, 5]]


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_hold_every_row_once_within_their_bounds(packing: bool) -> None:
    lengths = [5, 17, 3, 30, 8, 8, 21, 2]
    dataset = rows_of(lengths)
    layout = Layout(packing=packing, micro_batch_tokens=32, micro_batch_rows=3, pad_id=0)
    indices = [7, 3, 1, 0, 6, 2]
    batches = list(micro_batches(indices, dataset, layout))
    ids = [row for batch in batches for row in batch.row_ids]
    assert sorted(ids) == sorted(dataset.row_ids[i] for i in indices)
    assert sum(batch.tokens for batch in batches) == sum(lengths[i] for i in indices)
    assert sum(batch.trained_tokens for batch in batches) == sum(int(dataset.trained_counts[i]) for i in indices)
    for batch in batches:
        assert sum(document_lengths(batch)) == batch.tokens
        if packing:
            assert batch.input_ids.shape == (1, batch.tokens)
            assert batch.tokens <= 32
        else:
            assert len(batch.row_ids) <= 3
    if not packing:
        assert [max(document_lengths(batch)) for batch in batches] == [30, 5], "rows of like length lie together"


def test_a_beginning_that_all_rows_share_takes_room_once() -> None:
    beginning, trained = np.arange(100, dtype=np.int32), np.arange(120) >= 110
    own = [np.full(20, 200 + i, dtype=np.int32) for i in range(9)]
    rows = [Example(np.concatenate((beginning, end)), trained, f"f.jsonl:{i}") for i, end in enumerate(own)]
    dataset = TokenDataset.from_examples(rows, RenderStats())
    layout = Layout(packing=True, micro_batch_tokens=200, micro_batch_rows=1, pad_id=0, share_prefix=True)
    batches = list(micro_batches(range(9), dataset, layout))
    assert [batch.input_ids.numel() for batch in batches] == [200, 180]  # 100 and five ends of 20; 100 and four
    assert sum(batch.tokens for batch in batches) == 9 * 120
    alone = dataclasses.replace(layout, share_prefix=False)
    assert len(list(micro_batches(range(9), dataset, alone))) == 9


def test_a_row_longer_than_a_micro_batch_gets_one_of_its_own() -> None:
    layout = Layout(packing=True, micro_batch_tokens=10, micro_batch_rows=1, pad_id=0)
    batches = list(micro_batches([0, 1, 2], rows_of([4, 25, 5]), layout))
    assert sorted(batch.tokens for batch in batches) in ([9, 25], [4, 5, 25])


def test_no_rows_make_no_micro_batches() -> None:
    for packing in (True, False):
        assert list(micro_batches([], rows_of([3]), Layout(packing, 8, 2, 0))) == []


def test_the_default_micro_batch_holds_at_least_the_longest_row() -> None:
    assert default_micro_batch_tokens(512, torch.device("cpu")) == 2048
    assert default_micro_batch_tokens(4096, torch.device("cpu")) == 4096
    assert default_micro_batch_tokens(512, torch.device("cuda")) == 8192


def noise_by_row(packing: bool, order: list[int], lengths: list[int], epoch: int = 0) -> dict[str, torch.Tensor]:
    layout = Layout(packing=packing, micro_batch_tokens=40, micro_batch_rows=3, pad_id=0)
    found: dict[str, torch.Tensor] = {}
    for batch in micro_batches(order, rows_of(lengths), layout):
        noise = embedding_noise(batch, 8, 5.0, 1, epoch)
        assert noise.shape == (*batch.input_ids.shape, 8)
        start = 0
        for place, (length, row) in enumerate(zip(document_lengths(batch), batch.row_ids)):
            found[row] = noise[0, start : start + length] if packing else noise[place, :length]
            if not packing:
                assert not noise[place, length:].any(), "padding carries no noise"
            start += length
    return found


def test_a_rows_noise_is_the_same_however_it_lies() -> None:
    lengths = [5, 17, 3, 30, 8]
    packed = noise_by_row(True, [0, 1, 2, 3, 4], lengths)
    padded = noise_by_row(False, [4, 2, 0, 3, 1], lengths)
    assert packed.keys() == padded.keys()
    assert all(torch.equal(packed[row], padded[row]) for row in packed)


def test_noise_has_the_papers_scale_and_changes_with_epoch_and_row() -> None:
    (noise,) = noise_by_row(True, [0], [400]).values()
    bound = 5.0 / math.sqrt(400 * 8)
    assert noise.abs().max() <= bound
    assert noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(float(noise.mean())) < bound * 0.05
    (later,) = noise_by_row(True, [0], [400], epoch=1).values()
    assert not torch.equal(noise, later)
    both = noise_by_row(True, [0, 1], [20, 20])
    assert not torch.equal(both["f.jsonl:1"], both["f.jsonl:2"])


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 8)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embedding(ids)
        return out


def test_noise_is_added_in_training_only_and_taken_off_again() -> None:
    model = Embedded()
    (batch,) = micro_batches([0], rows_of([6]), Layout(True, 8, 1, 0))
    plain = model(batch.input_ids)
    with neftune(model, 5.0, seed=1) as prepare:
        prepare(batch, 0)
        noisy = model(batch.input_ids)
        torch.testing.assert_close(noisy - plain, embedding_noise(batch, 8, 5.0, 1, 0), rtol=0, atol=1e-6)
        model.eval()
        assert torch.equal(model(batch.input_ids), plain)
        model.train()
    assert torch.equal(model(batch.input_ids), plain)
    with neftune(model, None, seed=1) as prepare:
        prepare(batch, 0)
        assert torch.equal(model(batch.input_ids), plain)


def test_streams_have_seeds_of_their_own() -> None:
    seeds = {
        stream_seed("dropout", seed, step, 0, micro) for seed in range(4) for step in range(4) for micro in range(4)
    }
    assert len(seeds) == 64
    assert stream_seed("dropout", 1, 2) != stream_seed("dropout", 12), "parts are kept apart"
    assert all(0 <= seed < 2**63 for seed in seeds)
