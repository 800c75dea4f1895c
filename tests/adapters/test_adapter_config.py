"""LoraConfig: its checks, its immutability, and PEFT's adapter_config.json."""

from __future__ import annotations

import dataclasses
import json

import pytest

from veneer.adapters import LoraConfig
from veneer.errors import AdapterError


def test_a_tutorials_config_is_accepted_as_it_stands():
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.scaling(8, 16) == 2.0


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoraConfig().scaling(16, 32) == 2.0
    assert LoraConfig(use_rslora=True).scaling(16, 32) == 8.0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"r": 0}, "r"),
        ({"r": True}, "r"),
        ({"r": 2.5}, "r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"init_lora_weights": "gausian"}, "init_lora_weights"),
        ({"init_lora_weights": 0}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": "(q_proj"}, "target_modules"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "layers_pattern"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_fields_name(settings, field):
    with pytest.raises(AdapterError) as caught:
        LoraConfig(**settings)
    assert caught.value.where == f"LoraConfig.{field}"
    assert caught.value.fix


def test_a_misspelt_initialisation_gets_the_nearest_name():
    with pytest.raises(AdapterError, match="gaussian"):
        LoraConfig(init_lora_weights="gausian")


def test_a_config_does_not_follow_the_lists_it_was_made_from():
    names, ranks, ids = ["q_proj"], {"q_proj": 4}, [1, 2]
    config = LoraConfig(target_modules=names, rank_pattern=ranks, trainable_token_indices=ids)
    names.append("v_proj")
    ranks["v_proj"] = 8
    ids.append(3)
    assert (config.target_modules, config.rank_pattern, config.trainable_token_indices) == (
        ("q_proj",),
        {"q_proj": 4},
        (1, 2),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4


def test_the_files_dict_gives_the_same_config_back():
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=["lm_head"],
        layers_to_transform=[1, 0],
        use_rslora=True,
        rank_pattern={"b": 2, "a": 8},
        alpha_pattern={"a": 3.5},
        trainable_token_indices={"embed_tokens": [5, 2]},
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert data["target_modules"] == ["q_proj", "v_proj"]
    assert list(data["rank_pattern"]) == ["b", "a"]  # the first match wins: the order is part of the meaning
    again = LoraConfig.from_dict(data)
    assert again == dataclasses.replace(config, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1])


def test_pefts_own_default_file_is_read():
    peft = pytest.importorskip("peft")
    data = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    data["target_modules"] = sorted(data["target_modules"])
    data["peft_type"] = "LORA"
    config = LoraConfig.from_dict(data)
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 8, ("q_proj",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("some_key_of_the_future", 3),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_by_name(key, value):
    with pytest.raises(AdapterError) as caught:
        LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q_proj"], key: value})
    assert key in caught.value.where


def test_an_unknown_key_that_is_off_is_ignored():
    config = LoraConfig.from_dict({"target_modules": ["q_proj"], "some_key_of_the_future": None, "other": False})
    assert config.target_modules == ("q_proj",)


def test_an_adapter_of_another_method_is_refused():
    with pytest.raises(AdapterError, match="IA3"):
        LoraConfig.from_dict({"peft_type": "IA3", "target_modules": ["q_proj"]})


def test_a_file_with_a_bad_value_names_file_and_field():
    with pytest.raises(AdapterError) as caught:
        LoraConfig.from_dict({"target_modules": ["q_proj"], "r": -1}, where="x/adapter_config.json")
    assert "x/adapter_config.json" in caught.value.where
    assert "r" in caught.value.where
