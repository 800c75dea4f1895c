"""The intrinsic dimension: the projection is linear, seeded and has the right adjoint; d90 follows from the figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.intrinsic_dimension import draw, parse, summary, table
from benchmarks.intrinsic_dimension_projection import Fastfood, hadamard
from benchmarks.intrinsic_dimension_run import CONTESTANTS, place, train
from torch import nn

ROOT = Path(__file__).parents[1]
# d below, at and above a power of two; D a multiple of the width, and not.
SIZES = [(1, 5), (3, 100), (8, 64), (13, 1000), (64, 64)]


def dense(space: Fastfood) -> torch.Tensor:
    """``P [D, d]``, column by column."""
    return torch.stack([space(e) for e in torch.eye(space.dimension)], dim=1)


def hadamard_matrix(width: int) -> torch.Tensor:
    """Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize("width", [1, 2, 16])
def test_the_fast_transform_is_the_hadamard_matrix(width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(hadamard(x), x @ hadamard_matrix(width), atol=1e-5)


@pytest.mark.parametrize(("dimension", "size"), SIZES)
def test_the_projection_is_linear(dimension: int, size: int) -> None:
    space = Fastfood(dimension, size, seed=1)
    matrix = dense(space)
    assert matrix.shape == (size, dimension)
    theta = torch.randn(dimension, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(space(theta), matrix @ theta, atol=1e-5)


@pytest.mark.parametrize(("dimension", "size"), SIZES)
def test_the_adjoint_is_the_transpose(dimension: int, size: int) -> None:
    space = Fastfood(dimension, size, seed=1)
    flat = torch.randn(size, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(space.adjoint(flat), dense(space).t() @ flat, atol=1e-4)


def test_the_projection_is_its_seeds() -> None:
    theta = torch.ones(8)
    assert torch.equal(Fastfood(8, 50, seed=3)(theta), Fastfood(8, 50, seed=3)(theta))
    assert not torch.equal(Fastfood(8, 50, seed=3)(theta), Fastfood(8, 50, seed=4)(theta))


def test_its_rows_have_a_norm_of_about_one_and_its_columns_are_nearly_at_right_angles() -> None:
    matrix = dense(Fastfood(100, 20_000, seed=0))
    # The norm of a row of width 128 is that of 128 normal numbers: off by 1 / sqrt(2 * 128) in the mean square.
    assert matrix.square().sum(1).sqrt().mean() == pytest.approx(1.0, abs=0.05)
    unit = matrix / matrix.norm(dim=0)
    cosines = unit.t() @ unit - torch.eye(100)
    assert cosines.abs().max() < 0.05  # a few times 1 / sqrt(20,000)


@pytest.mark.parametrize("dimension", [0, 11])
def test_a_subspace_larger_than_the_space_is_refused(dimension: int) -> None:
    with pytest.raises(ValueError, match="1 to 10 dimensions"):
        Fastfood(dimension, 10, seed=0)


def job(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": 0.05, "steps": 60, "batch": 2, "seed": 0, **changes}


def quadratic(parameters: list[nn.Parameter], goal: torch.Tensor) -> Any:
    """The gradient of half the squared distance to ``goal``, as three tokens would give it."""

    def backward(rows: Sequence[int]) -> tuple[float, int]:
        loss = 1.5 * (nn.utils.parameters_to_vector(parameters) - goal).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return float(loss.detach()), 3

    return backward


def tensors() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.ones(8))]


def test_training_stays_in_the_subspace_and_finds_what_is_in_it() -> None:
    parameters, space = tensors(), Fastfood(4, 20, seed=0)
    start = nn.utils.parameters_to_vector(parameters).detach()
    goal = start + space(torch.tensor([0.4, -0.3, 0.2, 0.5]))
    losses = train(parameters, space, job(), 10, quadratic(parameters, goal))
    assert losses[-1] < 0.05 * losses[0]
    moved = nn.utils.parameters_to_vector(parameters).detach() - start
    matrix = dense(space)
    inside = matrix @ torch.linalg.lstsq(matrix, moved[:, None]).solution[:, 0]
    assert torch.allclose(inside, moved, atol=1e-5)
    assert moved.norm() > 0.1


def test_without_a_subspace_all_numbers_are_trained() -> None:
    parameters = tensors()
    goal = torch.linspace(-1, 1, 20)
    losses = train(parameters, None, job(steps=100), 10, quadratic(parameters, goal))
    assert losses[-1] < 0.01 * losses[0]


def test_a_flat_vector_goes_back_where_it_came_from() -> None:
    parameters = tensors()
    place(parameters, torch.arange(20.0))
    assert torch.equal(parameters[0], torch.arange(12.0).view(3, 4))
    assert torch.equal(nn.utils.parameters_to_vector(parameters), torch.arange(20.0))


def test_a_run_on_a_tiny_model_learns_in_a_subspace(tiny_base: Path, tiny_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "general.json").write_text("[]")
    settings = {
        "base": str(tiny_base),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 64,
        "rows": str(tiny_rows),
        "held_out": str(tiny_rows),
        "answers": "",
        "general": str(tmp_path / "general.json"),
        "dimension": 32,
    }
    found = CONTESTANTS["run"](job(**settings, steps=8, batch=4, learning_rate=2e-2) | settings)
    assert found["losses"][-1] < found["losses"][0]
    assert found["size"] > 32
    assert len(found["nll"]) == len(found["tokens"])


def record(method: str, dimension: int, nll: float, correct: float, rate: float = 1e-3, choosing: float = 9.0) -> Any:
    """Four held-out rows of ten tokens: two that choose, two that are reported."""
    return {
        "method": method,
        "dimension": dimension,
        "learning_rate": rate,
        "common": {"base": "a-model", "steps": 3, "batch": 4},
        "nll": [choosing, choosing, nll, nll],
        "correct": [0, 0, correct, correct],
        "tokens": [10] * 4,
        "size": 5000,
    }


BASE, FULL = record("base", 0, 20.0, 2), record("full", 0, 10.0, 8)


def test_d90_is_the_smallest_dimension_with_nine_tenths_of_the_gain() -> None:
    found = summary([BASE, FULL, record("8", 8, 13, 7), record("64", 64, 10.9, 7.0), record("256", 256, 10.5, 7.9)])
    assert found["d90"] == {"log-likelihood": 64, "token accuracy": 256}
    assert [row["dimension"] for row in found["dimensions"]] == [8, 64, 256, 5000]
    assert found["dimensions"][1]["shares"]["log-likelihood"] == pytest.approx(0.91)


def test_d90_is_all_of_lora_where_no_subspace_is_enough() -> None:
    assert summary([BASE, FULL, record("8", 8, 15, 4)])["d90"]["log-likelihood"] == 5000


def test_where_lora_gains_nothing_there_is_no_d90() -> None:
    found = summary([BASE, record("full", 0, 20.0, 2), record("8", 8, 15, 4)])
    assert found["d90"] == {"log-likelihood": None, "token accuracy": None}
    assert "d90 by token accuracy: not reached" in table(found)


def test_a_dimension_counts_at_the_rate_that_the_other_rows_choose() -> None:
    good, lucky = record("8", 8, 15, 4, rate=1e-2, choosing=5.0), record("8", 8, 10, 8, rate=1e-1, choosing=8.0)
    row = summary([BASE, FULL, good, lucky])["dimensions"][0]
    assert row["rate"] == 1e-2
    assert row["loss"] == pytest.approx(1.5)


def test_without_the_base_there_is_no_summary() -> None:
    with pytest.raises(SystemExit, match="have to be measured first"):
        summary([FULL])


def test_table_and_picture_show_every_dimension(tmp_path: Path) -> None:
    found = summary([BASE, FULL, record("64", 64, 10.9, 7.5)])
    text = table(found)
    assert "| 64 | 1.28 % | 0.001 | 1.0900 | 75.0 % | 91 % | 92 % |" in text
    assert "| 5,000 | all |" in text
    assert "d90 by log-likelihood: 64" in text
    draw(found, tmp_path / "plots" / "gain.png")
    assert (tmp_path / "plots" / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_quick_is_what_it_says_and_can_be_changed() -> None:
    assert parse(["--quick"]).dimensions == [64, 1024]
    assert parse(["--quick", "--dimensions", "32"]).dimensions == [32]


def test_wrong_options_are_refused_before_anything_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.intrinsic_dimension", "--dimensions", "0,8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--dimensions must be at least 1" in done.stderr
