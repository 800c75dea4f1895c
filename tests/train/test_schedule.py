"""The learning rate: warm-up, then constant, linear or cosine."""

import math

import pytest

from veneer.train.schedule import SCHEDULES, multiplier, warmup_steps


def test_warmup_climbs_evenly_and_never_starts_at_zero() -> None:
    assert [multiplier("constant", step, 10, 4) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_linear_falls_from_one_to_zero_after_the_warmup() -> None:
    values = [multiplier("linear", step, 12, 2) for step in range(2, 13)]
    assert values == pytest.approx([1 - i / 10 for i in range(11)])


def test_cosine_is_half_a_period() -> None:
    assert multiplier("cosine", 0, 8) == 1.0
    assert multiplier("cosine", 4, 8) == pytest.approx(0.5)
    assert multiplier("cosine", 2, 8) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert multiplier("cosine", 8, 8) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_step_of_a_run_has_a_rate_above_zero_and_at_most_the_peak(kind: str) -> None:
    for total in (1, 2, 3, 50):
        for ratio in (0.0, 0.03, 0.5, 1.0):
            warmup = warmup_steps(total, ratio)
            assert all(0 < multiplier(kind, step, total, warmup) <= 1 for step in range(total))


def test_steps_beyond_the_end_keep_the_end_value() -> None:
    assert multiplier("linear", 99, 10) == 0.0
    assert multiplier("constant", 99, 10) == 1.0


def test_warmup_is_rounded_up_and_bounded_by_the_run() -> None:
    assert [warmup_steps(total, 0.03) for total in (1, 10, 100, 1000)] == [1, 1, 3, 30]
    assert warmup_steps(5, 1.0) == 5
    assert warmup_steps(100, 0.0) == 0


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cosin': use one of cosine, linear, constant"):
        multiplier("cosin", 0, 10)
