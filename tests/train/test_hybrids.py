"""Runs over models that carry a state from token to token: their rows are padded, never packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Watcher

from veneer.errors import TrainError
from veneer.run import load_model, open_run
from veneer.train import train_recipe

HYBRIDS: dict[str, dict[str, Any]] = {
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "Bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
}


@pytest.fixture
def hybrid(tiny_base: Path, tmp_path: Path) -> Callable[[str], str]:
    """``hybrid("Bamba")``: the folder of a two-layer random model, one layer a state space, one attention."""

    def write(name: str) -> str:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **HYBRIDS[name],
        )
        folder = str(tmp_path / name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_trains_on_padded_rows_where_packing_is_left_at_its_default(
    name: str, recipe: Callable[..., Any], hybrid: Callable[[str], str]
) -> None:
    watcher = Watcher()
    result = train_recipe(recipe(base=hybrid(name), train={"max_steps": 6}), progress=watcher)
    said = next(text for _, text in watcher.messages if "padded side by side" in text)
    assert "carry a state from each token to the next" in said
    assert open_run(result.path).recipe.train.packing is False
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    loaded = load_model(result.path)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        assert torch.equal(loaded.module(ids).logits, result.model.module(ids).logits)


@pytest.mark.parametrize("settings", [{"packing": True}, {"micro_batch_tokens": 256}])
def test_packing_a_hybrid_is_refused_by_its_reason_where_it_is_asked_for(
    settings: dict[str, Any], recipe: Callable[..., Any], hybrid: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="1 layers of BambaForCausalLM carry a state") as caught:
        train_recipe(recipe(base=hybrid("Bamba"), train=settings))
    assert "model.layers.0.mamba (BambaMixer)" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_hybrids_batches_of_eight_are_eight_batches_of_one(
    recipe: Callable[..., Any], hybrid: Callable[[str], str], tmp_path: Path
) -> None:
    base, losses = hybrid("Bamba"), []
    for number, batches in enumerate((8, 1)):
        train = {"max_steps": 2, "per_device_train_batch_size": batches, "gradient_accumulation_steps": 8 // batches}
        made = recipe(base=base, train=train, output_dir=str(tmp_path / f"run{number}"))
        losses.append(train_recipe(made).metrics["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
