"""The draw of a token: the distribution is transformers' own, and one number per row decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from veneer.generate.sampling import Sampling, choose, row_noise, truncated_probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 5, 1.0), (0.9, 7, 0.6)]
)
def test_the_distribution_is_that_of_transformers_warpers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = torch.softmax(LogitsProcessorList(warpers)(torch.zeros(4, 1), logits.clone()), -1)
    got = truncated_probabilities(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close((got / got.sum(-1, keepdim=True)).float(), expected, rtol=1e-5, atol=1e-7)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9)
    logits = 2 * torch.randn(1, 20, generator=torch.Generator().manual_seed(1))
    expected = truncated_probabilities(logits, sampling)[0]
    count = 20_000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # every part of [0, 1) once
    drawn = choose(logits.expand(count, -1), sampling, noise)
    share = torch.bincount(drawn, minlength=20) / count
    assert float((share - expected / expected.sum()).abs().max()) <= 1 / count
    assert set(drawn.tolist()) == set(torch.nonzero(expected).squeeze(-1).tolist())


def test_the_ends_of_the_noise_draw_tokens_that_can_be_drawn() -> None:
    logits = torch.tensor([[-float("inf"), 1.0, 2.0, -float("inf")]])
    low = choose(logits, Sampling(1.0), torch.tensor([0.0], dtype=torch.float64))
    high = choose(logits, Sampling(1.0), torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert (int(low), int(high)) == (1, 2)


def test_greedy_and_top_1_take_the_most_likely() -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2], [5.0, -1.0, 4.9]])
    noise = torch.tensor([0.99, 0.5], dtype=torch.float64)
    assert choose(logits, Sampling(), None).tolist() == [1, 0]
    assert choose(logits, Sampling(2.0, top_k=1), noise).tolist() == [1, 0]
    assert choose(logits, Sampling(2.0, top_p=1e-9), noise).tolist() == [1, 0]


def test_noise_belongs_to_the_seed_and_the_row() -> None:
    assert torch.equal(row_noise(3, 7, 5), row_noise(3, 7, 9)[:5])
    rows = {tuple(row_noise(seed, row, 4).tolist()) for seed in range(3) for row in range(3)}
    assert len(rows) == 9
