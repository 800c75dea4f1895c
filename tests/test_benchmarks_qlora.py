"""The benchmark of QLoRA: its random model, what it hands to bitsandbytes, and what it concludes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import qlora_contestants as contestants
from benchmarks.contestants import in_4_bits
from benchmarks.memory import SHAPES, Shape
from benchmarks.qlora import loading_allowance, table, target, targets

ROOT = Path(__file__).parents[1]
TINY = Shape("tiny", 64, 2, 4, 2, 128, 320)


@pytest.fixture
def job(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A random model of :data:`TINY`, three steps of one row."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return {
        "base": str(tmp_path / "model"),
        "tokenizer": str(tiny_base),
        "shape": "tiny",
        "rows": str(tmp_path / "rows.jsonl"),
        "folder": str(tmp_path),
        "steps": 3,
        "batch": 1,
        "dtype": "float32",
        "max_length": 32,
        "micro_batch_tokens": 32,
        "learning_rate": 1e-2,
        "checkpointing": True,
        "seed": 0,
    }


def test_a_random_model_of_a_shape_is_loaded_and_trained_in_codes(job: dict[str, Any]) -> None:
    contestants.random_model(job)
    prepared = contestants.prepare(job)
    examples = json.loads((Path(job["folder"]) / "examples.json").read_text())
    assert prepared["batch"] == 1
    assert [len(example["input_ids"]) for example in examples] == [32] * 3
    result = contestants.veneer(job, "nf4")
    assert len(result["losses"]) == 3
    assert result["losses"][0] == pytest.approx(torch.log(torch.tensor(320.0)).item(), rel=0.1)
    linear = sum(out * width for out, width in TINY.linears) * TINY.layers
    plain = 4 * (TINY.embedding_parameters + TINY.norm_parameters)
    assert 1e9 * result["quantised_gb"] - plain == pytest.approx(linear * 4.13 / 8, rel=0.02)
    assert 1e9 * result["largest_tensor_gb"] == 4 * TINY.vocab * TINY.hidden
    assert result["interpreter_gb"] <= result["loading_peak_gb"]


def test_the_random_model_has_exactly_the_shapes_parameters(job: dict[str, Any]) -> None:
    from veneer.models import load_base

    contestants.random_model(job)
    module = load_base(job["base"], dtype="float32", device="cpu").module
    assert sum(parameter.numel() for parameter in module.parameters()) == TINY.parameters


def test_bitsandbytes_gets_the_same_codes_as_we_do(tiny_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from veneer.quant import quantize

    plain = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)
    weights = {name: p.detach().clone() for name, p in plain.named_parameters() if "proj" in name}
    model = in_4_bits({"dtype": "float32"})(plain)
    assert len(weights) == 14
    scales = 0
    for name, weight in weights.items():
        ours = quantize(weight)
        theirs = model.get_parameter(name)
        assert torch.equal(theirs.data.flatten(), ours.codes.flatten())
        scales += ours.nbytes - ours.codes.nbytes
    assert contestants._scales(model) == scales
    assert type(model.lm_head) is torch.nn.Linear


def curve(speed: float, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "peak_rss_gb": 1.0,
        "loading_peak_gb": 0.5,
        "weights_gb": 0.1,
        "losses": losses,
        "learning_rates": [1e-3] * len(losses),
    }


def test_the_targets_are_two_times_bitsandbytes_and_three_quarters_of_our_lora() -> None:
    results = {"qlora": curve(600, [1.0]), "bnb": {"speed_ratio": 2.1}, "lora16": {"speed_ratio": 0.7}}
    assert [entry["reached"] for entry in targets(results)] == [True, False]
    assert targets({"qlora": curve(600, [1.0])}) == []


def test_loading_may_hold_a_third_more_the_largest_tensor_and_the_interpreter() -> None:
    result = {"quantised_gb": 1.0, "largest_tensor_gb": 0.25, "interpreter_gb": 0.5}
    assert loading_allowance(result) == pytest.approx(2.05)


def test_the_table_has_ratios_curves_and_verdicts() -> None:
    from benchmarks.sft import compare_curves

    ours = curve(600, [3.0, 2.0, 1.0])
    results = {"qlora": ours, "bnb": curve(285, [3.0, 2.3, 1.0]), "lora16": curve(700, [2.5, 1.6, 0.8])}
    for name in ("bnb", "lora16"):
        theirs = results[name]
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        theirs |= {"speed_ratio": ratio, "memory_ratio": 0.5, "curve": compare_curves(ours, theirs)}
    told = {"base": "b", "dtype": "float32", "threads": 2, "batch": 8, "steps": 3, "tokens": 10}
    text = table({"settings": told, "warm_up_steps": 2, "results": results, "targets": targets(results)})
    for part in (
        "2.11 x as fast, with 0.50 x the memory",
        "2.0000     2.3000     1.6000",
        "curve of qlora and bnb: DIFFERENT",
        "by the quantisation",
        "at least 2.0 x as fast as bnb: reached (2.11)",
        "at least 0.75 x as fast as lora16: reached (0.86)",
    ):
        assert part in text


def test_the_table_of_a_shape_has_the_formulas_peak_beside_the_measured_one() -> None:
    result = {**curve(100, [11.0, 10.9]), "interpreter_gb": 0.4}
    told = {"shape": "s", "dtype": "float32", "threads": 2, "batch": 1, "steps": 3, "tokens": 10}
    missed = [target("peak memory under 4.0 GB", 4.5, False)]
    report = {"settings": told, "warm_up_steps": 2, "results": {"qlora": result}, "computed_gb": 2.86}
    text = table({**report, "targets": missed})
    assert "the formula's peak is 2.86 GB" in text
    assert "peak memory under 4.0 GB: MISSED (4.50)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "trl"], "unknown peer 'trl'"),
        (["--shape", "3b"], "unknown shape '3b'"),
        (["--steps", "2"], "must be more than 2"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.qlora", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
