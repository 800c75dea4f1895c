"""What runs in a process of its own for the comparison of variants, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import variants_run
from benchmarks.variants_cost import compare
from benchmarks.variants_methods import METHODS

from veneer.train import base as base_of_recipe


@pytest.fixture
def job(tiny_base: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(variants_run, "GENERAL_TOKENS", 8)
    monkeypatch.setattr("veneer.train.api.load_base_of", base_of_recipe.load_base_of)  # note_loading wraps it
    return {
        "base": str(tiny_base),
        "dtype": "float32",
        "device": "cpu",
        "steps": 4,
        "batch": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "seed": 0,
        "rows": str(tiny_rows),
        "held_out": str(tiny_rows),
        "answers": str(tiny_rows),
        "general": str(tmp_path / "general.json"),
        "folder": str(tmp_path),
        "threads": 1,
        **METHODS["dora"].recipe,
    }


def test_a_run_trains_by_its_recipe_and_measures_everything(job: dict[str, Any], tmp_path: Path) -> None:
    from veneer.recipe import load_recipe

    told = variants_run.general_answers(job)
    assert told["dtype"] == "float32"
    found = variants_run.run(job)
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", check_paths=False)
    assert recipe.adapter.use_dora
    assert recipe.train.learning_rate == 1e-2
    rows = len(found["tokens"])
    assert len(found["nll"]) == len(found["correct"]) == rows > 0
    assert len(found["losses"]) == 4
    assert found["losses"][-1] < found["losses"][0]
    assert len(found["drift"]) == len(json.loads((tmp_path / "general.json").read_text())) > 0
    assert all(kl > 0 for kl in found["drift"])
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert found["adapter_mb"] == file.stat().st_size / 1e6
    assert found["init_seconds"] >= 0
    assert found["peak_gb"] > 0
    assert set(found["exact"]) <= {0.0, 1.0}
    json.dumps(found)


def test_training_lowers_the_held_out_loss_of_the_rows_that_it_saw(job: dict[str, Any]) -> None:
    variants_run.general_answers(job)
    before, after = variants_run.untrained(job), variants_run.run(job)
    assert before["tokens"] == after["tokens"]
    assert sum(after["nll"]) < sum(before["nll"])
    assert "drift" not in before


def test_a_fresh_adapter_has_not_drifted(job: dict[str, Any], tmp_path: Path) -> None:
    from veneer.adapters import LoraConfig, attach
    from veneer.models import load_base

    variants_run.general_answers(job)
    adapted = attach(load_base(job["base"], dtype="float32", device="cpu"), LoraConfig(r=4), seed=0)
    general = json.loads((tmp_path / "general.json").read_text())
    assert variants_run.drift(adapted, general) == [0.0] * len(general)


def test_held_out_likelihoods_are_those_of_the_evaluation(job: dict[str, Any]) -> None:
    from veneer.data import read, render
    from veneer.evaluate import evaluate
    from veneer.models import load_base

    base = load_base(job["base"], dtype="float32", device="cpu")
    told = evaluate(base, job["held_out"], metrics=["perplexity"], resamples=1).rows
    dataset = render(read(job["held_out"]), base.tokenizer, max_length=64, train_on="last")
    found = variants_run.held_out(base.module, list(dataset), rows=3)
    assert found["tokens"] == [row.answer_tokens for row in told]
    assert found["nll"] == pytest.approx([row.answer_nll for row in told], rel=1e-5)


def test_drift_is_the_divergence_of_the_next_tokens(job: dict[str, Any]) -> None:
    from veneer.adapters import LoraConfig, attach
    from veneer.models import load_base

    base = load_base(job["base"], dtype="float32", device="cpu")
    adapted = attach(base, LoraConfig(r=4, init_lora_weights=False), seed=0)
    ids = [5, 9, 20, 31, 40]
    with torch.no_grad():
        theirs = adapted.module(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        with adapted.disabled():
            own = base.module(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    # The answer begins at token 2: what stands at 1, 2 and 3 predicts tokens 2, 3 and 4.
    wanted = (own * (own / theirs).log()).sum(-1)[1:4].mean()
    assert variants_run.drift(adapted, [{"ids": ids, "begins": 2}]) == pytest.approx([float(wanted)], rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_in_turn(job: dict[str, Any]) -> None:
    plain = {**job, **METHODS["lora"].recipe, "block": 1}
    found = compare({**job, "block": 1}, plain, rounds=2)
    assert len(found["steps"]) == len(found["memories"]) == 2
    assert found["step_ratio"] > 0
    assert found["whole_ratio"] > 0


@pytest.mark.slow
def test_a_process_that_fails_says_why(job: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="no such"):
        compare({**job, "base": "no such model", "block": 1}, {**job, "block": 1}, rounds=1)
