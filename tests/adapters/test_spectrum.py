"""The spectrum of an update against dense decompositions in float64, and the directions that are new to the base."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.adapters import LoraConfig
from veneer.adapters.directions import against_base, largest_cosines, leading
from veneer.adapters.spectrum import (
    Update,
    directions_for,
    distance,
    effective_rank,
    factors,
    singular_values,
    spectrum,
    updates,
)
from veneer.errors import AdapterError

SHAPES = [(24, 40, 6), (40, 24, 6), (5, 24, 8), (24, 5, 8), (12, 12, 1)]  # out, in, r; also r above a side


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors_of(out, width, r):
    return random(r, width, seed=1), random(out, r, seed=2)


@pytest.mark.parametrize(("out", "width", "r"), SHAPES)
def test_the_spectrum_is_that_of_the_dense_update(out, width, r):
    A, B = factors_of(out, width, r)
    dense = 1.7 * B @ A
    parts = spectrum(A, B, 1.7)
    n = min(out, width, r)
    torch.testing.assert_close(parts.S, torch.linalg.svdvals(dense)[:n], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(singular_values(A, B, 1.7), parts.S, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.U * parts.S @ parts.V.t(), dense, rtol=1e-12, atol=1e-11)
    for basis in (parts.U, parts.V):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("out", "width", "r"), SHAPES)
def test_the_cut_is_the_best_of_its_rank_and_its_factors_are_balanced(out, width, r):
    A, B = factors_of(out, width, r)
    U, S, Vh = torch.linalg.svd(2.0 * B @ A, full_matrices=False)
    parts = spectrum(A, B, 2.0)
    for n in range(1, r + 1):
        a, b = factors(parts, n, 0.5)
        assert [*a.shape, *b.shape] == [n, width, out, n]
        torch.testing.assert_close(0.5 * b @ a, U[:, :n] * S[:n] @ Vh[:n], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-12, atol=1e-12)


def test_the_same_update_gives_the_same_factors_however_it_was_factored():
    A, B = factors_of(20, 30, 4)
    mixed = random(4, 4, seed=3)
    one = factors(spectrum(A, B), 3, 1.0)
    other = factors(spectrum(torch.linalg.solve(mixed, A), B @ mixed), 3, 1.0)
    for mine, its in zip(one, other):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_the_effective_rank_counts_equal_directions_and_weighs_unequal_ones():
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    # Shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected)


def test_the_directions_for_a_share_of_the_energy_are_the_fewest():
    S = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # squares 9, 4, 1, 1, 1 of 16
    wanted = {9 / 16: 1, 0.57: 2, 13 / 16: 2, 0.82: 3, 0.9: 4, 1.0: 5, 0.01: 1}
    assert {energy: directions_for(S, energy) for energy in wanted} == wanted
    assert directions_for(torch.tensor([1.0, 0.0, 0.0]), 1.0) == 1
    assert directions_for(torch.zeros(3), 0.9) == 0


def test_the_distance_of_two_updates_is_that_of_the_dense_ones():
    first = Update("a", "linear", *factors_of(20, 30, 4), 0.5)
    second = Update("a", "linear", random(2, 30, seed=5), random(20, 2, seed=6), 3.0)
    dense = 0.5 * first.B @ first.A - 3.0 * second.B @ second.A
    assert distance(first, second) == pytest.approx(float(dense.norm()), rel=1e-12)


def decayed(out, width, rate=0.97):
    """A weight with a known decomposition: singular values ``rate ** i``."""
    n = min(out, width)
    U, V = (torch.linalg.qr(random(rows, n, seed=rows + 7))[0] for rows in (out, width))
    return U, rate ** torch.arange(n, dtype=torch.float64), V


@pytest.mark.parametrize(("out", "width"), [(20, 30), (30, 20), (300, 200)])
def test_the_leading_directions_are_those_of_the_dense_matrix(out, width):
    U, S, V = decayed(out, width, 0.9)
    weight = U * S @ V.t()
    found, values = leading(lambda x: weight @ x, lambda y: weight.t() @ y, weight.shape, 8, like=weight)
    torch.testing.assert_close(values, S[:8], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close((found.t() @ U[:, :8]).abs(), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("out", "width"), [(30, 20), (20, 30), (40, 40)])
def test_in_a_small_weight_the_largest_cosines_are_exact(out, width, dtype):
    U, S, V = decayed(out, width)
    weight = (U * S @ V.t()).to(dtype)
    inside = U @ torch.linalg.qr(random(U.shape[1], 5, seed=4))[0]
    outside = torch.linalg.qr(random(out, 5, seed=8))[0]  # of a tall weight, partly outside of its range
    ones = U[:, [0, 3, -1]]  # the weight's own
    asked = torch.cat([inside, outside, ones], dim=1)
    expected = (U.t() @ asked).abs().amax(0)
    found = largest_cosines(weight, asked.to(dtype))
    # In float32 the squares of the small singular values are near each other and near zero.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == torch.float64 else 2e-2)


def test_in_a_large_weight_the_largest_cosines_are_bounds_that_tell_spread_from_concentrated():
    U, S, V = decayed(400, 500, 0.99)
    weight = U * S @ V.t()
    spread = U @ torch.linalg.qr(random(400, 6, seed=4))[0]
    mixed = torch.stack([0.8 * U[:, k] + 0.6 * U[:, -k - 1] for k in (0, 40, 100)], dim=1)
    expected = (U.t() @ torch.cat([spread, mixed], dim=1)).abs().amax(0)
    found = largest_cosines(weight, torch.cat([spread, mixed], dim=1))
    assert (found > expected - 1e-6).all()
    assert (found[:6] < 0.5).all()  # the true ones are about 0.15
    assert (found[6:] - 0.8).abs().max() < 0.02


def intruding(size):
    """A weight diag(10, 9, ..., 1) in a larger space, and an update along a direction spread over eight of its own."""
    weight = torch.zeros(40, 48, dtype=torch.float64)
    weight[range(10), range(10)] = torch.arange(10, 0, -1, dtype=torch.float64)
    even = torch.zeros(40, 1, dtype=torch.float64)
    even[2:10] = 1 / math.sqrt(8)
    right = torch.zeros(1, 48, dtype=torch.float64)
    right[0, 20] = 1  # where the weight gives nothing
    return weight, Update("x", "linear", right, size * even, 1.0)


def test_a_strong_update_along_a_direction_of_its_own_is_one_new_direction():
    weight, update = intruding(100.0)
    result = against_base(update, weight, directions=1)
    # The leading vector is the update's own, 1 / sqrt(8) from eight of the base's vectors.
    assert result.cosines[0] == pytest.approx(1 / math.sqrt(8), abs=0.01)
    assert result.new_directions == 1
    assert result.base_norm == pytest.approx(math.sqrt(385))
    assert result.base_spectral_norm == pytest.approx(10)
    assert result.change_norm == pytest.approx(100)


def test_a_weak_update_and_one_along_the_bases_own_direction_bring_nothing_new():
    weight, weak = intruding(0.01)
    assert against_base(weak, weight, directions=4).new_directions == 0
    along = Update(
        "x", "linear", torch.eye(48, dtype=torch.float64)[:1], 50 * torch.eye(40, dtype=torch.float64)[:, :1], 1
    )
    result = against_base(along, weight, directions=4)
    assert result.new_directions == 0
    assert result.cosines == pytest.approx([1.0] * 4, abs=1e-6)


def test_a_direction_outside_of_the_bases_range_is_new():
    weight, update = intruding(100.0)
    outside = torch.zeros(40, 1, dtype=torch.float64)
    outside[30] = 100
    result = against_base(Update("x", "linear", update.A, outside, 1.0), weight, directions=3)
    assert result.cosines == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)


def test_vectors_of_zero_singular_values_are_not_looked_at():
    weight, update = intruding(100.0)
    assert len(against_base(update, weight, directions=30).cosines) == 10


def test_doras_change_counts_the_magnitude_and_its_spectrum_that_of_the_adapted_weight():
    out, width = 30, 20
    weight, A, B = random(out, width, seed=11), random(3, width, seed=12), random(out, 3, seed=13)
    magnitude = random(out, seed=14).abs() + 1
    adapted = weight + 0.5 * B @ A
    adapted = magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    result = against_base(Update("x", "linear", A, B, 0.5, magnitude), weight, directions=4)
    assert result.change_norm == pytest.approx(float((adapted - weight).norm()), rel=1e-10)
    g = magnitude / (weight + 0.5 * B @ A).norm(dim=1)
    assert result.row_scale == pytest.approx(float((g - 1).abs().mean()), rel=1e-10)
    ours, theirs = torch.linalg.svd(adapted)[0][:, :4], torch.linalg.svd(weight, full_matrices=False)[0]
    expected = (theirs.t() @ ours).abs().amax(0)
    assert result.cosines == pytest.approx(expected.tolist(), abs=1e-5)


PREFIX = "base_model.model."


def file_of(path, out=6, width=8, r=2):
    return {f"{PREFIX}{path}.lora_A.weight": torch.ones(r, width), f"{PREFIX}{path}.lora_B.weight": torch.ones(out, r)}


def test_the_patterns_decide_rank_and_scaling():
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q", "k"], rank_pattern={"k": 4}, alpha_pattern={r"1\.k": 3}, use_rslora=True
    )
    tensors = {**file_of("layers.0.q"), **file_of("layers.0.k", r=4), **file_of("layers.1.k", r=4)}
    found = {update.path: update for update in updates(config, tensors, where="file")}
    scalings = {"layers.0.q": 8 / math.sqrt(2), "layers.0.k": 4.0, "layers.1.k": 1.5}
    assert {path: update.scaling for path, update in found.items()} == pytest.approx(scalings)
    assert found["layers.1.k"].r == 4


def test_a_stack_of_experts_is_one_update_for_each_with_rows_and_columns_as_in_the_file():
    E, out, width, r = 3, 5, 7, 2
    A, B = random(E * r, width, seed=1), random(out, r * E, seed=2)
    config = LoraConfig(r=r, lora_alpha=2, target_modules=[], target_parameters=["experts.down_proj"])
    tensors = {f"{PREFIX}experts.lora_A.weight": A, f"{PREFIX}experts.lora_B.weight": B}
    found = updates(config, tensors, where="file")
    # PEFT's own formula for the update of expert e.
    dense = torch.einsum("ore,eri->eoi", B.view(out, r, E), A.view(E, r, width))
    assert [update.name for update in found] == [f"experts.down_proj[{e}]" for e in range(E)]
    for update, expected in zip(found, dense):
        torch.testing.assert_close(update.scaling * update.B @ update.A, expected)


def stacks_of(module, up=2, down=2, E=3):
    """The two stacks of a module as PEFT nests them: the first parameter lies deeper."""
    return {
        **file_of(f"{module}.base_layer", r=E * up),
        **file_of(module, r=E * down),
    }


@pytest.mark.parametrize(
    "entries", [["gate_up_proj", "down_proj"], ["mlp.experts.down_proj", "experts.gate_up_proj"]], ids=str
)
def test_the_depth_in_the_file_names_the_stack_and_patterns_for_it_decide(entries):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q"], target_parameters=entries,
        rank_pattern={"down_proj": 2, r"1\.mlp\.experts\.gate_up_proj": 1}, alpha_pattern={"gate_up_proj": 2},
    )  # fmt: skip
    tensors = stacks_of("0.mlp.experts", up=4) | stacks_of("1.mlp.experts", up=1) | file_of("0.q", r=4)
    found = updates(config, tensors, where="file")
    strengths = {update.path: (update.r, update.scaling) for update in found}
    assert strengths == {
        "0.mlp.experts.gate_up_proj": (4, 0.5),
        "0.mlp.experts.down_proj": (2, 4.0),
        "1.mlp.experts.gate_up_proj": (1, 2.0),
        "1.mlp.experts.down_proj": (2, 4.0),
        "0.q": (4, 2.0),
    }
    assert [update.expert for update in found if update.path == "0.mlp.experts.down_proj"] == [0, 1, 2]
    deep = next(update for update in found if update.path == "0.mlp.experts.gate_up_proj")
    assert deep.keys[0] == f"{PREFIX}0.mlp.experts.base_layer.lora_A.weight"


def test_a_linear_beside_experts_is_one_update_whatever_its_rank():
    settings = {"r": 4, "lora_alpha": 4, "target_parameters": ["gate_up_proj", "down_proj"]}
    tensors = stacks_of("mlp.experts", 4, 4) | file_of("mlp.gate", r=1)
    for targets in (["gate"], "all-linear"):
        config = LoraConfig(target_modules=targets, rank_pattern={r"mlp\.gate": 1}, **settings)
        found = {update.name: update for update in updates(config, tensors, where="file")}
        assert found["mlp.gate"].r == 1
        assert len(found) == 7


def test_stacks_that_the_file_does_not_tell_apart_keep_their_place_unless_their_ranks_differ():
    settings = {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    tensors = file_of("experts", r=6)  # one of two
    assert {update.path for update in updates(LoraConfig(**settings), tensors, where="file")} == {"experts"}
    with pytest.raises(AdapterError, match=r"one of experts\.down_proj, experts\.gate_up_proj, and their ranks differ"):
        updates(LoraConfig(**settings, rank_pattern={"down_proj": 3}), tensors, where="file")


def test_stacks_of_one_module_with_other_numbers_of_experts_are_refused():
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(AdapterError, match="no update of rank 4 for each of 3 experts"):
        updates(config, stacks_of("experts", up=4, down=8), where="file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{PREFIX}q.lora_A.weight"].fill_(math.nan), r"q\.lora_A\.weight' has NaN or Inf"),
        (lambda t: t.pop(f"{PREFIX}q.lora_B.weight"), "'q' has one factor of two"),
        (lambda t: t.update({f"{PREFIX}q.lora_A.weight": torch.ones(2, 8, 1)}), "they should be matrices"),
        (lambda t: t.update(file_of("q", r=3)), r"\[3, 8\] and \[6, 3\]: no update of rank 2"),
    ],
)
def test_a_file_that_cannot_be_an_adapter_is_refused(change, message):
    tensors = file_of("q")
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        updates(LoraConfig(r=2, target_modules=["q"]), tensors, where="file")
