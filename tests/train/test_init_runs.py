"""Starts that are not random, inside a run: said, the same every time, not repeated on resume, and saved plainly."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines

import veneer
from veneer.adapters import LoraConfig, attach
from veneer.models import load_base
from veneer.run import load_model
from veneer.train import start as train_start

TRAIN = {"max_steps": 6, "save_steps": 3, "max_length": 64, "per_device_train_batch_size": 4, "save_total_limit": None}
STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"adapter": {"r": 4, "init_lora_weights": "pissa"}},
    "eva": {"adapter": {"r": 4, "init_lora_weights": "eva"}},
    "lora_ga": {"adapter": {"r": 4, "init_lora_weights": "lora_ga", "lora_ga_config": {"rows": 8}}},
    "loftq": {"adapter": {"r": 4, "init_lora_weights": "loftq"}, "quantize": "nf4"},
    "loftq, 3 rounds": {
        "adapter": {"r": 4, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}},
        "quantize": "nf4",
    },
}


@pytest.mark.parametrize("settings", STARTS.values(), ids=list(STARTS))
def test_a_resumed_run_goes_on_bit_for_bit_and_does_not_start_anew(
    settings: dict[str, Any], small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run("whole", train=TRAIN, **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000006")

    def not_again(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the rows were looked at again")

    monkeypatch.setattr(train_start, "initialise_from", not_again)
    result, _ = small_run("cut", train=TRAIN, resume=True, **settings)
    assert result.steps == 6
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole, cut = (tmp_path / run / "adapter" / name for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize(
    ("start", "said", "rank"),
    [
        ("pissa", "plain LoRA of up to rank 8", 8),
        ("eva", "layers start along", 4),
        ("lora_ga", "layers start along their gradients, in one pass; its file is a plain LoRA of up to rank 8", 8),
        ("loftq", "% off the original weights", 4),
        ("loftq, 3 rounds", "codes of its own", 8),
    ],
)
def test_a_run_says_how_it_starts_and_its_folder_answers_as_it_did(
    start: str, said: str, rank: int, small_run: Callable[..., Any], tmp_path: Path
) -> None:
    result, watcher = small_run(train=TRAIN, **STARTS[start])
    assert any(said in text for _, text in watcher.messages)
    converted = [text for _, text in watcher.messages if "the file is a plain LoRA of rank 8 (trained with 4)" in text]
    assert len(converted) == (start in ("pissa", "lora_ga"))
    saved = json.loads((result.adapter / "adapter_config.json").read_text())
    assert saved["r"] == rank
    assert saved["init_lora_weights"] is True
    loaded: Any = load_model(result.path, device="cpu")
    assert (loaded.base.quantized is None) == (start != "loftq")
    if start == "loftq, 3 rounds":
        return  # the codes of its own are not in the file: it is for the weights in 16 bits, a little off
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (model.module(input_ids=ids).logits for model in (result.model, loaded))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_step_0_is_the_base_also_where_the_adapter_acts_from_the_start(small_run: Callable[..., Any]) -> None:
    results = [
        small_run(name, train=TRAIN, quantize="nf4", adapter=adapter)[0]
        for name, adapter in (("loftq", {"r": 4, "init_lora_weights": "loftq"}), ("plain", {"r": 4}))
    ]
    assert results[0].metrics["base_eval_loss"] == results[1].metrics["base_eval_loss"]
    assert results[0].metrics["eval_loss"] != results[1].metrics["eval_loss"]


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_two_processes_start_alike(
    method: str,
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    small_run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    one = {**TRAIN, "max_steps": 2, "per_device_train_batch_size": 4}
    small_run("one", train=one, **STARTS[method])
    recipe = write_recipe("two", train={**one, "per_device_train_batch_size": 2}, **STARTS[method])
    process = start_train(recipe, processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    alone, together = ([line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("one", "two"))
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_initialise_in_python_is_what_a_run_does(
    method: str, small_run: Callable[..., Any], tiny_base: Path, tiny_rows: Path
) -> None:
    config = LoraConfig(r=4, init_lora_weights=method)
    model = attach(load_base(tiny_base, dtype="float32", device="cpu"), config, seed=0)
    assert model.waiting
    veneer.initialise(model, str(tiny_rows), max_length=64)
    assert not model.waiting
    assert model.parameters()
    other = attach(load_base(tiny_base, dtype="float32", device="cpu"), config, seed=0)
    veneer.initialise(other, str(tiny_rows), max_length=64)
    assert all(torch.equal(value, other.state()[key]) for key, value in model.state().items())
