"""Runs that teach new tokens: their rows are trained, kept, resumed and used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import lines

import veneer
from veneer.adapters import LoraConfig, attach
from veneer.errors import TrainError, UsageError
from veneer.models import load_base
from veneer.run import load_model, open_run
from veneer.train import train, train_recipe

WORDS = ["seven", "what follows"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_recipes_new_tokens_are_trained_and_come_back_with_the_run(
    tied: bool, make_tiny_base: Callable[..., Path], recipe: Callable[..., Any]
) -> None:
    base = make_tiny_base(tie_word_embeddings=tied)
    result = train_recipe(recipe(base=str(base), data={"add_tokens": WORDS}))
    start = load_base(base, dtype="float32", device="cpu")
    start.add_tokens(WORDS)
    rows = {key: value for key, value in result.model.state().items() if "trainable_tokens" in key}
    assert len(rows) == (1 if tied else 2)
    initial = start.module.get_input_embeddings().weight[300:]
    assert (next(iter(rows.values())) - initial).abs().max() > 1e-3
    loaded = load_model(result.path)
    assert loaded.base.tokenizer.encode("what follows seven", add_special_tokens=False)[0] == 301
    ids = torch.tensor([[20, 300, 25, 301]])
    with torch.no_grad():
        assert torch.equal(loaded.module(ids).logits, result.model.module(ids).logits)


def test_a_resumed_run_with_new_tokens_is_the_run_that_was_never_stopped(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"adapter": {"trainable_token_indices": [5]}, "data": {"eval": None, "add_tokens": WORDS}}
    whole = recipe(output_dir=str(tmp_path / "whole"), train={"max_steps": 4, "save_steps": 2}, **settings)
    train_recipe(whole)
    train_recipe(recipe(output_dir=str(tmp_path / "cut"), train={"max_steps": 4, "save_steps": 2}, **settings))
    for step in ("step-000004",):
        for file in sorted((tmp_path / "cut" / "checkpoints" / step).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (tmp_path / "cut" / "checkpoints" / step).rmdir()
    result = train_recipe(
        recipe(output_dir=str(tmp_path / "cut"), train={"max_steps": 4, "save_steps": 2}, **settings), resume=True
    )
    assert result.steps == 4
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_run_in_python_says_its_new_tokens_in_its_recipe(tiny_base: Path, tiny_rows: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, dtype="float32", device="cpu")
    model = attach(base, LoraConfig(r=4, trainable_token_indices=veneer.add_tokens(base, WORDS)), seed=0)
    result = train(model, str(tiny_rows), output_dir=tmp_path / "run", max_steps=2, samples=0)
    assert open_run(result.path).recipe.data.add_tokens == WORDS
    again = yaml.safe_load((result.path / "recipe.yaml").read_text())
    again["output_dir"] = str(tmp_path / "again")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    twin = train_recipe(tmp_path / "again.yaml")
    assert twin.metrics["train_loss"] == pytest.approx(result.metrics["train_loss"], rel=1e-6)


def test_new_tokens_that_the_adapter_does_not_train_are_refused(
    tiny_base: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    base = load_base(tiny_base, dtype="float32", device="cpu")
    veneer.add_tokens(base, WORDS)
    with pytest.raises(TrainError, match="2 tokens were added to the base and the adapter does not train them"):
        train(attach(base, LoraConfig(r=4)), str(tiny_rows), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_token_of_the_recipe_that_is_known_already_is_refused(recipe: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a token already"):
        train_recipe(recipe(data={"add_tokens": ["<|im_end|>"]}))
    assert not (tmp_path / "run").exists()
