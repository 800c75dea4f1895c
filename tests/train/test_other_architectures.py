"""Families that are unlike the others: each trains, or is refused before anything is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from veneer.errors import ModelError, TrainError
from veneer.models import load_base, load_tokenizer
from veneer.models.head import body_of, check_head
from veneer.run import load_model
from veneer.train import train_recipe

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
# The class, and its settings beside the small ones.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("MambaForCausalLM", {"state_size": 4, "time_step_rank": 4}),
    "Rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 32}),
    "MiniMax": (
        "MiniMaxForCausalLM",
        {"num_local_experts": 2, "head_dim": 8, "layer_types": ["full_attention", "linear_attention"]},
    ),
    "JetMoe": (
        "JetMoeForCausalLM",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 4},
    ),
    "Llama4Text": (
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48, "layer_types": ["full_attention"] * 2},
    ),
    "ModernBertDecoder": ("ModernBertDecoderForCausalLM", {"cls_token_id": 1, "sep_token_id": 2}),
    "Bart": (
        "BartForConditionalGeneration",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "tie_word_embeddings": True},
    ),
    "BigBird": ("BigBirdForMaskedLM", {"attention_type": "original_full", "tie_word_embeddings": True}),
}


@pytest.fixture
def write(tiny_base: Path, tmp_path: Path) -> Callable[[str], str]:
    """``write("Mamba")``: the folder of a tiny random model with a tokenizer."""

    def make(name: str) -> str:
        tokenizer, folder = load_tokenizer(tiny_base), str(tmp_path / name)
        special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
        model_class, settings = FAMILIES[name]
        settings = {**SMALL, "vocab_size": len(tokenizer), **special, **settings}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**settings)
            getattr(transformers, model_class)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    rows = [{"text": f"word {n} " * (1 + n % 3), "label": ("even", "odd")[n % 2]} for n in range(24)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["Mamba", "Rwkv", "MiniMax", "JetMoe"])
def test_it_trains_writes_samples_and_comes_back(
    name: str, write: Callable[[str], str], recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    made = recipe(base=write(name), train={"max_steps": 6}, eval={"samples": 2, "metrics": ["exact_match"]})
    with caplog.at_level(logging.WARNING, logger="veneer.generate"):
        result = train_recipe(made)
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert "eval_exact_match" in result.metrics
    slow = [record for record in caplog.records if "computes its whole row again" in record.message]
    assert len(slow) == (0 if name == "JetMoe" else 1)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        assert torch.equal(load_model(result.path).module(ids).logits, result.model.module(ids).logits)


def test_a_class_that_names_itself_as_its_decoder_is_read_all_the_same(write: Callable[[str], str]) -> None:
    module: Any = load_base(write("Llama4Text"), dtype="float32", device="cpu").module
    assert module.get_decoder() is module.model or body_of(module) is module.model
    check_head(module)


def test_a_head_of_several_layers_is_refused_before_the_run(
    write: Callable[[str], str], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="ModernBertDecoderForCausalLM changes its logits") as caught:
        train_recipe(recipe(base=write("ModernBertDecoder")))
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_pooler_that_no_classifier_reads_is_no_part_of_the_head(
    write: Callable[[str], str], recipe: Callable[..., Any], labelled: str
) -> None:
    settings = {"task": "classification", "data": {"train": labelled}, "train": {"max_steps": 4}}
    folder = write("BigBird")
    assert load_base(folder, dtype="float32", labels=["even", "odd"]).head == ("classifier",)
    result = train_recipe(recipe(base=folder, **settings, eval={"samples": 2}))
    assert result.steps == 4


def test_a_classifier_that_fails_on_the_rows_is_refused_before_the_run(
    write: Callable[[str], str], recipe: Callable[..., Any], labelled: str, tmp_path: Path
) -> None:
    settings = {"task": "classification", "data": {"train": labelled}}
    with pytest.raises(
        TrainError, match=r"BartForSequenceClassification cannot classify these rows: .*<eos>"
    ) as caught:
        train_recipe(recipe(base=write("Bart"), **settings))
    assert "labelled.jsonl:" in str(caught.value.where)
    assert not (tmp_path / "run").exists()
