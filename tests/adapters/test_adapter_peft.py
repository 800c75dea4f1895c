"""The file format is the ecosystem's: what we write PEFT reads, and the other way round, with the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer.adapters import LoraConfig, attach, load_adapter
from veneer.errors import AdapterError

peft = pytest.importorskip("peft")
# PEFT talks about tied weights, embeddings and base model names on its own account.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

# float32, the same formula summed in another order
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

QV = ["q_proj", "v_proj"]
CASES = {
    "plain": ("llama", {"target_modules": QV}),
    "dropout": ("llama", {"target_modules": QV, "lora_dropout": 0.1}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear, some layers": ("llama", {"target_modules": "all-linear", "exclude_modules": ["1.mlp.up_proj"]}),
    "regex": ("llama", {"target_modules": r".*\.1\..*(q_proj|up_proj)"}),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6},
            "alpha_pattern": {"q_proj": 3, r"layers\.1.*v_proj": 20},
        },
    ),
    "patterns whose order matters": (
        "llama",
        {
            "target_modules": QV,
            "rank_pattern": {"q_proj": 6, r"layers\.1.*": 2},
            "alpha_pattern": {"q_proj": 3, r"layers\.1.*": 20},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"target_modules": QV, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 20}},
    ),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": [1]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "saved": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "model.norm"]}),
    "saved inner": ("llama", {"target_modules": "all-linear", "modules_to_save": ["layers.1.mlp"]}),
    "saved tied": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": [5, 1, 3]}),
    "tied tokens": ("tied", {"target_modules": QV, "trainable_token_indices": [5, 1, 3]}),
    "named tokens": (
        "llama",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7, 3, 2]}},
    ),
    "tied named tokens": (
        "tied",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [5, 1]}},
    ),
    "tied but different tokens": (
        "tied",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7, 3, 2]}},
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora with rslora and patterns": (
        "llama",
        {"target_modules": QV, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "conv1d all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "conv1d with tokens": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 1, 3]}),
}


@pytest.fixture
def make(llama, gpt2):
    return {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2}


def randomise(parameters):
    """Values that make every part of the adapter show in the logits."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def settings_of(case):
    return {"r": 4, "lora_alpha": 8} | CASES[case][1]


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_write_with_the_same_logits(case, make, ids, run, tmp_path):
    base = make[CASES[case][0]]
    adapted = attach(base(), LoraConfig(**settings_of(case)), seed=0)
    randomise(adapted.parameters())
    expected = run(adapted.module, ids)
    with adapted.disabled():
        assert (run(adapted.module, ids) - expected).abs().max() > 1e-2
    adapted.save(tmp_path / "a")
    with warnings.catch_warnings():
        # PEFT does not stop at a missing key, it warns: here that is a failure.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(run(theirs, ids), expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_writes_with_the_same_logits(case, make, ids, run, tmp_path):
    base = make[CASES[case][0]]
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**settings_of(case), task_type="CAUSAL_LM")).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    expected = run(theirs, ids)
    theirs.save_pretrained(tmp_path / "a")
    if case == "patterns whose order matters":
        # PEFT sorts the patterns of the file, so that its own reloaded model is another one. The file is what counts.
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert list(config["alpha_pattern"]) == sorted(config["alpha_pattern"])
        rewritten = config | {"rank_pattern": settings_of(case)["rank_pattern"]}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(rewritten))
        expected = run(peft.PeftModel.from_pretrained(base(), str(tmp_path / "a")).eval(), ids)
    adapted = load_adapter(base(), tmp_path / "a")
    torch.testing.assert_close(run(adapted.module, ids), expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_keys_and_shapes_of_the_file_are_pefts(case, make, tmp_path):
    base = make[CASES[case][0]]
    attach(base(), LoraConfig(**settings_of(case))).save(tmp_path / "ours")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**settings_of(case)))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    ours, other = ({key: tuple(value.shape) for key, value in file.items()} for file in files)
    assert ours == other


def test_pefts_bare_ends_of_names_are_read_as_peft_means_them(llama, ids, run, tmp_path):
    """modules_to_save=["norm"] saves every module whose path ends in these letters, the layers' norms too."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=QV, modules_to_save=["norm"])).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    adapted = load_adapter(llama(), tmp_path / "a")
    assert sum("layernorm" in key for key in adapted.state()) == 4
    torch.testing.assert_close(run(adapted.module, ids), run(theirs, ids), **TOLERANCE)
    ours = attach(llama(), LoraConfig(target_modules=QV, modules_to_save=["norm"]))
    assert not any("layernorm" in key for key in ours.state())
    adapted.save(tmp_path / "b")  # whole names: the meaning survives
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "b")).eval()
    torch.testing.assert_close(run(again, ids), run(theirs, ids), **TOLERANCE)


def test_an_entry_of_a_foreign_file_that_matches_nothing_is_said_and_not_refused(llama, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "query_key_value"], modules_to_save=["norm", "score"])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "a")
    adapted = load_adapter(llama(), tmp_path / "a")
    assert "'query_key_value' matches nothing" in str(adapted.coverage)
    assert "'score' matches nothing" in str(adapted.coverage)


def test_an_embedding_that_peft_adds_to_the_file_may_only_be_the_bases(llama, ids, run, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["embed_tokens"])).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    adapted = load_adapter(llama(), tmp_path / "a")
    torch.testing.assert_close(run(adapted.module, ids), run(theirs, ids), **TOLERANCE)
    module = llama(seed=1)
    with pytest.raises(AdapterError, match=r"brings its own weights for 'model\.embed_tokens'"):
        load_adapter(module, tmp_path / "a")


def test_a_bfloat16_file_of_peft_becomes_float32_tensors(llama, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=QV)).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "a")
    adapted = load_adapter(llama().to(torch.bfloat16), tmp_path / "a")
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


def test_all_linear_is_written_as_names_that_mean_the_same_to_peft(llama, gpt2, tmp_path):
    def written(module, **settings):
        attach(module, LoraConfig(**settings)).save(tmp_path / "a")
        return json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    short = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert written(llama())["target_modules"] == short
    assert written(llama(), layers_to_transform=[1])["target_modules"] == short
    assert written(gpt2())["fan_in_fan_out"] is True

    module = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())})
    module["b"] = torch.nn.Sequential(torch.nn.Embedding(4, 2))
    assert written(module, r=2)["target_modules"] == ["a.0"]  # '0' would also name the embedding


def test_a_peft_model_is_not_attached_to(llama):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=QV))
    with pytest.raises(AdapterError, match="has adapters already"):
        attach(theirs, LoraConfig())


def test_token_rows_of_a_head_with_a_bias_are_said_not_to_be_in_peft(tmp_path: Path) -> None:
    """PEFT 0.21.2 multiplies with the head's rows and leaves its bias out."""
    from transformers import GPTJConfig, GPTJForCausalLM

    def base() -> Any:
        torch.manual_seed(0)
        config = GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, tie_word_embeddings=True)
        model = GPTJForCausalLM(config).eval()
        torch.nn.init.normal_(model.lm_head.bias)
        return model

    ids = torch.arange(8)[None]
    module = base()
    adapted = attach(module, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]), seed=0)
    folder = adapted.save(tmp_path / "a")
    said = json.loads((folder / "veneer.json").read_text())["not_in_peft"]
    assert len(said) == 1
    assert "token rows of lm_head are trained, it leaves the layer's bias out" in said[0]
    theirs = peft.PeftModel.from_pretrained(base(), str(folder)).eval()
    with torch.no_grad():
        difference = module(ids).logits - theirs(ids).logits
    torch.testing.assert_close(difference, module.lm_head.bias.expand_as(difference), atol=1e-5, rtol=1e-4)
