"""The figures of a classifier against formulas written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from veneer.evaluate.class_scores import bootstrap_f1, class_scores, confusion, macro_f1

ACTUAL = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
SAID = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0]


def f1_by_hand(actual: list[int], said: list[int], name: int) -> float | None:
    hits = sum(a == b == name for a, b in zip(actual, said))
    total = actual.count(name) + said.count(name)
    return 2 * hits / total if total else None


def macro_by_hand(actual: list[int], said: list[int], classes: int) -> float:
    found = [f1 for name in range(classes) if (f1 := f1_by_hand(actual, said, name)) is not None]
    return sum(found) / len(found)


def test_the_matrix_counts_who_is_taken_for_whom() -> None:
    assert confusion(ACTUAL, SAID, 3).tolist() == [[3, 1, 0], [0, 1, 1], [1, 0, 3]]


def test_precision_recall_and_f1_are_the_hand_formulas() -> None:
    a, b, c, d = class_scores(confusion(ACTUAL, SAID, 4), ["a", "b", "c", "d"])
    assert (a.rows, a.predicted, a.precision, a.recall, a.f1) == (4, 4, 0.75, 0.75, 0.75)
    assert (b.rows, b.predicted, b.precision, b.recall, b.f1) == (2, 2, 0.5, 0.5, 0.5)
    assert c.f1 == f1_by_hand(ACTUAL, SAID, 2)
    assert (d.rows, d.precision, d.recall, d.f1) == (0, None, None, None)


def test_macro_f1_is_the_mean_over_the_classes_that_occur() -> None:
    assert macro_f1(confusion(ACTUAL, SAID, 3)) == pytest.approx(macro_by_hand(ACTUAL, SAID, 3))
    assert macro_f1(confusion(ACTUAL, SAID, 5)) == pytest.approx(macro_by_hand(ACTUAL, SAID, 5))
    assert macro_f1(confusion([0, 0], [1, 1], 3)) == 0.0, "a class that is only predicted counts, as in scikit-learn"


def test_intervals_are_those_of_a_plain_loop_over_resampled_rows() -> None:
    base = [2] * 10
    macro, each = bootstrap_f1(ACTUAL, SAID, base, 4, resamples=400, seed=3)
    generator = np.random.default_rng(3)
    drawn = []
    for index in generator.integers(0, 10, size=(400, 10)).tolist():
        actual, said, other = ([column[i] for i in index] for column in (ACTUAL, SAID, base))
        drawn.append((macro_by_hand(actual, said, 4), macro_by_hand(actual, other, 4)))
    assert macro.value.value == pytest.approx(macro_by_hand(ACTUAL, SAID, 4))
    assert macro.base is not None
    assert macro.difference is not None
    assert macro.base.value == pytest.approx(macro_by_hand(ACTUAL, base, 4))
    model, other_model = (np.array(column) for column in zip(*drawn))
    for estimate, sample in ((macro.value, model), (macro.base, other_model), (macro.difference, model - other_model)):
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(sample, [0.025, 0.975])))
    assert each[3] is None, "a class that occurs nowhere"
    assert each[1] is not None
    assert each[1].value.value == 0.5
    assert each[1].base is not None
    assert each[1].base.value == 0.0
    assert 0.0 <= each[1].value.low <= 0.5 <= each[1].value.high <= 1.0


def test_the_same_seed_gives_the_same_intervals() -> None:
    one, two = (bootstrap_f1(ACTUAL, SAID, SAID, 3, resamples=100, seed=1)[0] for _ in range(2))
    assert one == two
    assert one.difference is not None
    assert one.difference.low == one.difference.high == 0.0
