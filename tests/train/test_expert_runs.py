"""Runs that train experts: through the loop, resumed, and with the experts that the rows activate most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines

from veneer.adapters import LoraConfig, attach
from veneer.errors import AdapterError
from veneer.models import load_base
from veneer.recipe import load_recipe
from veneer.train import train
from veneer.train.distributed import World
from veneer.train.experts import with_chosen_experts
from veneer.train.preflight import read_rows, render_rows

ADAPTER = {"r": 4, "target_modules": ["q_proj"], "experts": "all"}


@pytest.fixture(scope="module")
def moe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mixtral with the tiny base's tokenizer."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("moe"), AutoTokenizer.from_pretrained(tiny_base)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def test_experts_train_and_packed_rows_are_single_rows(
    small_run: Callable[..., Any], moe: Path, tmp_path: Path
) -> None:
    for name, packing in (("packed", True), ("single", False)):
        small_run(name, base=str(moe), adapter=ADAPTER, train={"packing": packing})
    packed, single = losses(tmp_path / "packed"), losses(tmp_path / "single")
    assert packed == pytest.approx(single, rel=1e-4)
    assert packed[-1] < 0.9 * packed[0]


def test_a_run_goes_on_from_a_checkpoint_with_the_same_losses(
    small_run: Callable[..., Any], moe: Path, tmp_path: Path
) -> None:
    settings = {"base": str(moe), "adapter": {**ADAPTER, "experts": [0, 2]}}
    small_run("whole", train={"max_steps": 8, "save_steps": 4}, **settings)
    small_run("parts", train={"max_steps": 8, "save_steps": 4}, **settings)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000008")
    _, watcher = small_run("parts", train={"max_steps": 8, "save_steps": 4}, resume=True, **settings)
    assert 0 < watcher.started[0][1] < 8
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    record = json.loads((tmp_path / "parts" / "adapter" / "veneer.json").read_text())
    assert set(map(tuple, record["experts"].values())) == {(0, 2)}


def test_top_k_takes_the_experts_that_the_rows_activate_most(recipe: Callable[..., Any], moe: Path) -> None:
    made = recipe(base=str(moe), adapter={**ADAPTER, "experts": "top-2"})
    base = load_base(moe, dtype="float32", device="cpu")
    rows, _ = read_rows(made.data, lambda text: None)
    wanted = LoraConfig(r=4, experts="top-2")
    config, table = with_chosen_experts(wanted, base, rows, made, World())
    assert table is not None
    attach(base, config)
    # The same count by hand, over all rows: there are fewer than the sample takes.
    plain = load_base(moe, dtype="float32", device="cpu")
    dataset = render_rows(rows, plain.tokenizer, made, World())
    assert sum(map(sum, table.counts.values())) == 2 * 2 * sum(int(n) for n in dataset.lengths)
    again, _ = with_chosen_experts(wanted, plain, rows, made, World())
    assert again == config


def test_a_config_without_top_k_stays_itself_and_too_many_experts_are_refused_before_rows_are_rendered(
    recipe: Callable[..., Any], moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.train.experts.render_rows", lambda *_: pytest.fail("rows were rendered"))
    base = load_base(moe, dtype="float32", device="cpu")
    config = LoraConfig(r=4, experts="all")
    assert with_chosen_experts(config, base, None, recipe(), World()) == (config, None)  # type: ignore[arg-type]  # not read
    with pytest.raises(AdapterError, match="top-500 of 4"):
        with_chosen_experts(LoraConfig(r=4, experts="top-500"), base, None, recipe(), World())  # type: ignore[arg-type]  # not read


def test_experts_that_were_chosen_layer_by_layer_train_and_stand_in_the_recipe_of_the_run(
    moe: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    chosen = {"model.layers.0.mlp.experts": [1], "model.layers.1.mlp.experts": [0, 3]}
    base = load_base(moe, dtype="float32", device="cpu")
    config = LoraConfig(r=4, target_modules=["q_proj"], experts=chosen)
    train(attach(base, config, seed=0), str(tiny_rows), output_dir=tmp_path / "python", eval_data=None, max_steps=2)
    recipe = load_recipe(tmp_path / "python" / "recipe.yaml")
    assert recipe.adapter.experts == chosen
    record = json.loads((tmp_path / "python" / "adapter" / "veneer.json").read_text())
    assert record["experts"] == chosen


def test_a_recipe_with_top_k_counts_on_its_rows_and_trains_those(
    small_run: Callable[..., Any], moe: Path, tmp_path: Path
) -> None:
    _, watcher = small_run("top", base=str(moe), adapter={**ADAPTER, "experts": "top-2"})
    assert any("experts that training rows activate most" in text for _, text in watcher.messages)
    chosen = json.loads((tmp_path / "top" / "adapter" / "veneer.json").read_text())["experts"]
    assert [len(experts) for experts in chosen.values()] == [2, 2]
