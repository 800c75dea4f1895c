"""The error table: what it measures on a tiny model, and what it concludes from figures."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import quantisation_measure as measure
from benchmarks.quantisation import command_of, prepare_rows, run
from benchmarks.quantisation_claims import claims
from benchmarks.quantisation_page import page
from benchmarks.storages import PLAIN, STORAGES, Storage

ROOT = Path(__file__).parents[1]
NF4 = Storage("nf4", 64, True)


@pytest.fixture
def job(tiny_base: Path, tiny_rows: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_base),
        "dtype": "float32",
        "steps": 2,
        "batch": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "seed": 0,
        "rows": str(tiny_rows),
        "held_out": str(tiny_rows),
        "label": "tiny rows",
        "folder": str(tmp_path),
        "command": "python -m benchmarks.quantisation",
    }


def figures(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row of plausible figures for each storage."""
    rows: dict[str, dict[str, Any]] = {}
    for storage in STORAGES:
        row: dict[str, Any] = {"before": 6.0, "after": 1.5, "bits": 4.5}
        if storage != PLAIN:
            row |= {"gaussian_error": 0.1, "weight_error": 0.1, "output_error": 0.1}
            row |= {"gap_before": [2.0, 1.5, 2.5], "gap_after": [0.01, -0.01, 0.03]}
        rows[storage.name] = row
    rows["not quantised"] |= {"before": 4.0, "after": 1.49, "bits": 16.0}
    rows["NF4, blocks of 64, double"]["bits"] = 4.127
    for name, change in changes.items():
        rows[name] |= change
    return rows


def verdict(rows: dict[str, dict[str, Any]], start: str) -> str:
    found = [c["verdict"] for c in claims(rows, trained=True) if c["claim"].startswith(start)]
    assert found
    return str(found[0])


def test_the_table_has_every_storage_once() -> None:
    names = [storage.name for storage in STORAGES]
    assert len(set(names)) == len(names)
    for name in ("not quantised", "NF4, blocks of 128, double", "FP4, blocks of 64", "INT8, a scale per row"):
        assert name in names


def test_a_gaussian_weight_loses_least_in_nf4_of_the_4_bit_schemes() -> None:
    schemes = ("nf4", "fp4", "int4", "int8")
    errors = dict(zip(schemes, measure.gaussian_errors([Storage(s) for s in schemes], (128, 256), seed=0)))
    assert errors["int8"] < errors["nf4"] < errors["int4"] < errors["fp4"]
    # NF4's levels against a normal distribution in blocks of 64.
    assert errors["nf4"] == pytest.approx(0.092, abs=0.002)


def test_layer_inputs_are_what_the_layers_read(job: dict[str, Any]) -> None:
    base = measure.load(job)
    found = measure.layer_inputs(base, job["rows"], positions=32, max_length=64)
    paths = measure.linears(base)
    assert found.keys() == paths.keys()
    assert not any("lm_head" in path for path in paths)
    attention = "model.layers.0.self_attn."
    assert found[f"{attention}q_proj"] is found[f"{attention}v_proj"]
    assert found[f"{attention}o_proj"] is not found[f"{attention}q_proj"]
    for path, linear in paths.items():
        assert found[path].shape == (32, linear.in_features)
    # The first layer's input is the embeddings' output through its norm: root mean squares near one.
    norm = base.module.get_submodule("model.layers.0.input_layernorm")
    assert found[f"{attention}q_proj"].square().mean().sqrt() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_layer_errors_are_those_of_the_layers_themselves(job: dict[str, Any]) -> None:
    base = measure.load(job)
    inputs = measure.layer_inputs(base, job["rows"], positions=32, max_length=64)
    found = measure.layer_errors(base, inputs, NF4)
    plain = {path: (linear.weight.clone(), linear(inputs[path])) for path, linear in measure.linears(base).items()}
    measure.put_into_codes(base, NF4)
    coded = {path: base.module.get_submodule(path) for path in plain}
    ratios = [measure.relative(coded[path](inputs[path]) - y, y) ** 2 for path, (_, y) in plain.items()]
    assert found["output_error"] == pytest.approx(math.sqrt(sum(ratios) / len(ratios)), rel=1e-4)
    weights = torch.cat([weight.flatten() for weight, _ in plain.values()])
    decoded = torch.cat([layer.weight.dequantize().flatten() for layer in coded.values()])  # type: ignore[operator, union-attr]
    assert found["weight_error"] == pytest.approx(measure.relative(decoded - weights, weights), rel=1e-5)
    stored = sum(layer.weight.nbytes for layer in coded.values())  # type: ignore[union-attr]
    assert found["bits"] == 8 * stored / len(weights)


def test_codes_leave_the_head_alone(job: dict[str, Any]) -> None:
    base = measure.load(job)
    before = base.module.get_output_embeddings()
    measure.put_into_codes(base, Storage("int4"))
    assert base.module.get_output_embeddings() is before
    assert not measure.linears(base)


def test_without_steps_the_adapter_changes_nothing(job: dict[str, Any]) -> None:
    found = measure.perplexities({**job, "steps": 0}, PLAIN)
    # A fresh adapter adds zeros, and its attention rounds in another order.
    assert found["before"] == found["after"]
    assert found["bits"] == 32.0
    gap = measure.gaps(found, found)
    assert gap["gap_before"] == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_the_whole_run_on_a_tiny_model(job: dict[str, Any]) -> None:
    report = run(job)
    rows = report["storages"]
    plain = rows["not quantised"]
    assert plain["after"] < plain["before"]
    assert rows["INT8, a scale per row"]["before"] == pytest.approx(plain["before"], rel=0.02)
    for storage in STORAGES:
        row = rows[storage.name]
        if storage != PLAIN:
            assert row["gap_before"][0] == pytest.approx(row["before"] - plain["before"])
            assert row["gap_before"][1] <= row["gap_before"][0] <= row["gap_before"][2]
    json.dumps(report)
    text = page(report)
    assert all(f"| {storage.name} |" in text for storage in STORAGES)
    assert "Q4_1" not in text


def test_nf4_far_under_int4_by_one_mean_and_not_by_the_other_is_said_of_both() -> None:
    rows = figures(**{"NF4, blocks of 64": {"gaussian_error": 0.086, "output_error": 0.05}})
    assert verdict(rows, "NF4's error is about 25 % (20 to 30) under INT4's, on Gaussian") == (
        "true as mean square, false as root mean square"
    )
    assert verdict(rows, "NF4's error is about 25 % (20 to 30) under INT4's, on the layers'") == "false"


@pytest.mark.parametrize(("bits", "said"), [(4.127, "true"), (4.2, "false")])
def test_double_quantisation_is_judged_by_the_bits_it_saves(bits: float, said: str) -> None:
    rows = figures(**{"NF4, blocks of 64, double": {"bits": bits}})
    assert verdict(rows, "double quantisation saves") == said
    assert verdict(rows, "NF4 with double quantisation takes 4.127") == said


@pytest.mark.parametrize(("points", "said"), [(0.5, "false"), (1.0, "true"), (3.0, "true"), (3.1, "false")])
def test_the_cost_in_perplexity_is_judged_by_its_points(points: float, said: str) -> None:
    rows = figures(**{"NF4, blocks of 64, double": {"gap_before": [points, points - 0.1, points + 0.1]}})
    assert verdict(rows, "QLoRA's base") == said


@pytest.mark.parametrize(("low", "said"), [(-0.01, "true"), (0.005, "false")])
def test_training_wins_back_what_is_not_above_zero_by_more_than_chance(low: float, said: str) -> None:
    rows = figures(**{"NF4, blocks of 64, double": {"gap_after": [0.01, low, 0.03]}})
    assert verdict(rows, "training wins it back") == said


def test_without_training_nothing_is_said_of_training() -> None:
    assert not any("training" in c["claim"] for c in claims(figures(), trained=False))


def report_of(**changes: Any) -> dict[str, Any]:
    settings = {
        "base": "a-model",
        "steps": 3,
        "batch": 4,
        "learning_rate": 5e-4,
        "seed": 0,
        "threads": 2,
        "label": "some rows",
        "dtype": "bfloat16",
        "cpu": "AVX512",
        "stored_as": None,
        "gaussian": [2048, 2048],
        "positions": 256,
        "held_out": 4,
        "held_out_tokens": 154,
    }
    return {
        "settings": {**settings, **changes},
        "versions": {"torch": "2.0"},
        "command": "python -m benchmarks.quantisation --steps 3",
        "storages": figures(),
        "claims": claims(figures(), trained=True),
    }


def test_the_page_has_its_command_its_figures_and_its_verdicts() -> None:
    text = page(report_of())
    for part in (
        "Written by `python -m benchmarks.quantisation --steps 3`",
        "| NF4, blocks of 64, double | 10.00 % | 10.00 % | 10.00 % | 4.127 |",
        "| NF4, blocks of 64, double | 6.000 | +2.000 (+1.500 to +2.500) | 1.500 | +0.010 (-0.010 to +0.030) |",
        "| not quantised | 4.000 |  | 1.490 |  |",
        "| true |",
    ):
        assert part in text
    assert "coarse grid" not in text
    assert "learning rate 0.0005" in " ".join(text.split())


def test_the_page_says_that_a_gguf_files_weights_are_rounded_already() -> None:
    assert "come from a file of Q4_1" in " ".join(page(report_of(stored_as="Q4_1")).split())


def test_the_page_without_training_has_no_column_for_it() -> None:
    text = page(report_of(steps=0))
    assert "after LoRA" not in text
    assert "LoRA: rank 16" not in text


def test_the_command_on_the_page_hides_where_files_lie() -> None:
    shown = command_of(["--data", "/somewhere/else/rows.jsonl", "--steps", "3"])
    assert shown == "python -m benchmarks.quantisation --data rows.jsonl --steps 3"


def test_a_file_is_split_and_never_overlaps(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}", "completion": "x"}}\n' for n in range(6)))
    folder = tmp_path / "out"
    folder.mkdir()
    train, held_out, label = prepare_rows(argparse.Namespace(data=data, rows=4, held_out=2), folder)
    assert train.read_text() + held_out.read_text() == data.read_text()
    assert label == "data.jsonl"
    with pytest.raises(SystemExit, match="only 6 rows, and 7 are needed"):
        prepare_rows(argparse.Namespace(data=data, rows=4, held_out=3), folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "10", "--rows", "8"], "--rows must be at least 80"),
        (["--held-out", "0"], "--held-out must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.quantisation", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
