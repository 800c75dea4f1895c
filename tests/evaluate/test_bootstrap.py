"""The paired bootstrap: exact values, pairing, coverage, seeds."""

from __future__ import annotations

import numpy as np
import pytest

from veneer.evaluate import bootstrap
from veneer.evaluate.bootstrap import bootstrap_mean, bootstrap_perplexity


def test_the_value_is_the_plain_mean_and_lies_in_its_interval() -> None:
    found = bootstrap_mean([1, 0, 1, 1], [0, 0, 1, 0])
    assert found.base is not None
    assert found.difference is not None
    assert (found.value.value, found.base.value, found.difference.value) == (0.75, 0.25, 0.5)
    for estimate in (found.value, found.base, found.difference):
        assert estimate.low <= estimate.value <= estimate.high


def test_the_interval_of_a_mean_is_the_normal_one_where_rows_are_many() -> None:
    values = np.random.default_rng(1).random(2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    found = bootstrap_mean(values)
    # 10,000 resamples place a 95 % quantile to about 3 % of the half width.
    assert found.value.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.value.high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert found.base is None
    assert found.difference is None


def test_the_difference_is_paired_so_what_rows_share_cancels() -> None:
    generator = np.random.default_rng(2)
    difficulty = generator.normal(size=200) * 10
    found = bootstrap_mean(difficulty + 1, difficulty)
    assert found.difference is not None
    assert found.difference.low == pytest.approx(1.0)
    assert found.difference.high == pytest.approx(1.0)
    assert found.value.high - found.value.low > 1  # each mean by itself is far less certain


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(3).random(50)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(50)
    whole = bootstrap_mean(values, resamples=1000)
    monkeypatch.setattr(bootstrap, "_CHUNK", 50 * 7)
    assert bootstrap_mean(values, resamples=1000) == whole


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(6)
    hits = 0
    for trial in range(300):
        found = bootstrap_mean(generator.random(100) < 0.4, resamples=500, seed=trial)
        hits += found.value.low <= 0.4 <= found.value.high
    # 95 % of 300 with a standard error of 1.3 points; the percentile interval is known to fall a little short.
    assert 0.90 <= hits / 300 <= 0.99


def test_perplexity_is_of_all_tokens_together_and_not_a_mean_over_rows() -> None:
    nll, tokens = [10.0, 1.0], [5, 1]
    found = bootstrap_perplexity(nll, tokens, [12.0, 1.0])
    assert found.base is not None
    assert found.difference is not None
    assert found.value.value == pytest.approx(np.exp(11 / 6))
    assert found.base.value == pytest.approx(np.exp(13 / 6))
    assert found.difference.value == pytest.approx(np.exp(11 / 6) - np.exp(13 / 6))
    # The two rows can be drawn as (1,1), (1,2) or (2,2): the interval's ends are the extreme draws.
    assert (found.value.low, found.value.high) == (pytest.approx(np.exp(1.0)), pytest.approx(np.exp(2.0)))


def test_the_perplexitys_interval_is_that_of_resampled_rows_with_their_tokens() -> None:
    generator = np.random.default_rng(7)
    tokens = generator.integers(1, 200, size=40)
    nll = tokens * generator.uniform(0.5, 3, size=40)
    index = np.random.default_rng(3).integers(0, 40, size=(500, 40))
    drawn = [np.exp(nll[rows].sum() / tokens[rows].sum()) for rows in index]
    found = bootstrap_perplexity(nll, tokens, resamples=500, seed=3).value
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_a_perplexity_beyond_all_floats_stays_finite() -> None:
    found = bootstrap_perplexity([1e9], [1])
    assert np.isfinite([found.value.value, found.value.low, found.value.high]).all()


@pytest.mark.parametrize("values", [[], [[1.0]], [float("nan")]])
def test_values_that_have_no_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"row|finite"):
        bootstrap_mean(values)


def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_mean([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="tokens"):
        bootstrap_perplexity([1.0, 2.0], [1, 0])
