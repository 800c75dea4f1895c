"""What ``all-linear`` chooses on tiny random models of the real classes, and what it says of the rest."""

from __future__ import annotations

import re

import pytest
import tiny_models
import torch
from torch import nn

from veneer.adapters import LoraConfig, attach, resolve
from veneer.adapters.save import warnings_of
from veneer.adapters.slots import base_modules
from veneer.adapters.structure import left_out
from veneer.errors import AdapterError

QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
MAMBA2 = {"in_proj", "out_proj"}
MAMBA1 = {*MAMBA2, "x_proj", "dt_proj"}
CHOSEN = {
    "llama": QKVO | GATED,
    "llama, tied": QKVO | GATED,
    "mistral": QKVO | GATED,
    "qwen2": QKVO | GATED,
    "qwen3": QKVO | GATED,
    "gemma2": QKVO | GATED,
    "gemma3": QKVO | GATED,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt-neox": NEOX,
    "falcon": NEOX,
    "olmo": QKVO | GATED,
    "olmo2": QKVO | GATED,
    "mixtral": QKVO | {"gate"},
    "qwen2-moe": QKVO | GATED | {"gate", "shared_expert_gate"},
    "qwen3-moe": QKVO | {"gate"},
    "deepseek-v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate"} | GATED,
    "phimoe": QKVO | {"router"},
    "gpt-oss": QKVO | {"router"},
    "jamba": QKVO | GATED | MAMBA1 | {"router"},
    "zamba2": QKVO | MAMBA2 | {"gate_up_proj", "down_proj", "linear", "0", "1"},
    "nemotron-h": QKVO | MAMBA2 | {"up_proj", "down_proj", "gate"},
    "falcon-h1": QKVO | GATED | MAMBA2,
    "bamba": QKVO | GATED | MAMBA2,
    "mamba": MAMBA1,
    "llava": QKVO | GATED,
    "qwen2-vl": QKVO | GATED,
    "qwen2.5-vl": QKVO | GATED,
    "gemma3-vision": QKVO | GATED,
    "smolvlm": QKVO | GATED,
    "llama, classes": QKVO | GATED,
    "bert, classes": {"query", "key", "value", "dense"},
    "roberta, classes": {"query", "key", "value", "dense"},
}


def chosen(module, **settings):
    return [target.path for target in resolve(module, LoraConfig(**settings)).lora]


def last(path):
    return path.rpartition(".")[2]


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_all_linear_chooses_every_projection_of_the_architecture(name):
    assert {last(path) for path in chosen(tiny_models.ALL[name]())} == CHOSEN[name]


def test_a_router_whose_matrix_is_read_without_calling_it_is_left_out_with_the_reason():
    class TopKRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared = TopKRouter(), nn.Linear(4, 4)

    assert chosen(Block(), r=2) == ["shared"]
    assert left_out(base_modules(Block()))["gate"].why == "a TopKRouter whose matrix is read without calling it"
    with pytest.raises(AdapterError, match="whose matrix is read without calling it"):
        chosen(Block(), r=2, target_modules=["gate"])


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_no_head_convolution_or_expert_is_chosen_and_all_other_linears_of_the_language_model_are(name):
    module = tiny_models.ALL[name]()
    paths = set(chosen(module))
    heads = {"lm_head", "score", "classifier", "classifier.dense", "classifier.out_proj"}
    other_towers = re.compile(r"model\.(vision|visual|multi_modal|connector)")
    linears = {path for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    linears |= {path for path, part in module.named_modules() if type(part).__name__ == "Conv1D"}
    linears |= {path for path, part in module.named_modules() if type(part).__name__.endswith("Router")}
    assert paths == {path for path in linears if path not in heads and not other_towers.match(path)}


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_every_matrix_is_adapted_or_said_to_be_left_out(name):
    adapted = attach(tiny_models.ALL[name](), LoraConfig(r=4))
    said = str(adapted.coverage)
    taken = {path for path, _ in adapted.module.named_modules()}
    for path, parameter in adapted.module.named_parameters():
        owner, _, attribute = path.rpartition(".")
        is_adapter = ".adapters." in path
        is_covered = owner.endswith(".base_layer") and owner.removesuffix(".base_layer") in taken
        is_small = parameter.ndim < 2 or "bias" in attribute or "embed" in path or "wte" in path or "wpe" in path
        if not (is_adapter or is_covered or is_small):
            names = (last(owner), attribute, ".".join(path.split(".")[:2]))
            assert any(re.search(rf"^not adapted: .*{re.escape(n)}", said, re.M) for n in names), path


def test_the_table_says_what_was_left_out_and_how_to_have_it():
    said = str(attach(tiny_models.MOE["mixtral"](), LoraConfig(r=4)).coverage)
    assert "not adapted: gate" not in said
    assert "not adapted: experts.gate_up_proj (2 x [4, 96, 32]): stacked experts; experts: all" in said
    assert "not adapted: lm_head (1 x [64, 32]): a head; name it in target_modules or in modules_to_save" in said
    said = str(attach(tiny_models.HYBRID["jamba"](), LoraConfig(r=4)).coverage)
    assert "not adapted: conv1d (2 x [64, 1, 4]): a convolution; modules_to_save: [conv1d]" in said
    assert (
        "not adapted: A_log (2 x [64, 4]): a parameter of the recurrence; in full by modules_to_save: [A_log]" in said
    )
    said = str(attach(tiny_models.VISION["llava"](), LoraConfig(r=4)).coverage)
    assert re.search(r"not adapted: model\.vision_tower \(\d+ matrices\): outside of the language model", said)


def test_what_is_trained_in_another_way_is_not_said_to_be_left_out():
    config = LoraConfig(r=4, modules_to_save=["router", "lm_head", "conv1d"])
    said = str(attach(tiny_models.HYBRID["jamba"](), config).coverage)
    assert not re.search(r"^not adapted: (router|lm_head|conv1d)", said, re.M)


def test_the_vision_tower_is_adapted_where_its_layers_are_named():
    module = tiny_models.VISION["llava"]()
    both = chosen(module, target_modules=["q_proj"])
    assert [path.split(".")[1] for path in both] == ["vision_tower", "language_model", "language_model"]
    only = chosen(module, target_modules=r".*vision_tower.*(q_proj|v_proj)")
    assert {path.split(".")[1] for path in only} == {"vision_tower"}
    projector = chosen(module, target_modules=["linear_1", "q_proj"])
    assert "model.multi_modal_projector.linear_1" in projector


def test_the_head_of_a_classifier_is_adapted_only_by_name():
    module = tiny_models.CLASSIFIER["roberta, classes"]()
    assert "classifier.dense" in chosen(module, target_modules=["classifier.dense"])
    assert not any(path.startswith("classifier") for path in chosen(module))


def test_experts_that_are_a_list_of_layers_are_left_alone_as_stacked_ones_are():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared = nn.Linear(4, 2), nn.Linear(4, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    assert chosen(Block(), r=2) == ["gate", "shared"]
    assert "not adapted: experts.* (2 x [4, 4]): a routed expert" in str(attach(Block(), LoraConfig(r=2)).coverage)
    assert chosen(Block(), r=2, target_modules=["experts.1"]) == ["experts.1"]


@pytest.mark.parametrize(
    ("group", "name", "target", "what", "fix"),
    [
        ("HYBRID", "jamba", "conv1d", "a Conv1d cannot be adapted: it is a convolution", "in_proj, x_proj, dt_proj"),
        ("HYBRID", "mamba", "conv1d", "a Conv1d cannot be adapted", r"modules_to_save: \[conv1d\]"),
        ("HYBRID", "jamba", "mamba", "a JambaMambaMixer cannot be adapted", "name its layers: in_proj"),
        ("MOE", "gpt-oss", "experts", "a GptOssExperts cannot be adapted", "experts|only linear layers"),
        ("DENSE", "gpt2", "c_atn", "matches nothing", "c_attn"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_by_its_reason_and_the_names_beside_it(
    group, name, target, what, fix
):
    module = getattr(tiny_models, group)[name]()
    with pytest.raises(AdapterError, match=what) as caught:
        resolve(module, LoraConfig(target_modules=[target]))
    assert re.search(fix, str(caught.value))


@pytest.mark.parametrize(
    ("settings", "what", "where", "fix"),
    [
        ({"layers_to_transform": [9]}, "left with no linear layer", "layers_to_transform", "the layers are 0 to 1"),
        ({"exclude_modules": ".*"}, "left with no linear layer", "exclude_modules", "exclude fewer modules"),
        (
            {"target_modules": ["A_log"]},
            "a parameter of BambaMixer and no layer",
            "target_modules",
            r"modules_to_save: \[A_log\]",
        ),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused_by_what_took_it_all(settings, what, where, fix):
    with pytest.raises(AdapterError, match=what) as caught:
        resolve(tiny_models.HYBRID["bamba"](), LoraConfig(r=4, **settings))
    assert caught.value.where == f"LoraConfig.{where}"
    assert re.search(fix, str(caught.value.fix))


def test_parameters_of_three_dimensions_that_are_no_stacks_of_experts_are_not_said_to_be():
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_gate_weight = nn.Parameter(torch.zeros(2, 4, 4))
            self.shared = nn.Linear(4, 4)

    block = nn.Sequential()
    block.add_module("rg", Gates())
    said = str(attach(block, LoraConfig(r=2)).coverage)
    assert "rg.input_gate_weight (1 x [2, 4, 4]): a parameter of Gates; modules_to_save: [rg], all of it" in said
    assert "experts" not in said


def test_a_rank_that_some_matrix_cannot_have_is_said_but_not_of_routers():
    adapted = attach(tiny_models.MOE["qwen2-moe"](), LoraConfig(r=20, lora_alpha=40))
    ranks = {last(target.path): target.r for target in adapted.plans["default"].lora}
    assert (ranks["q_proj"], ranks["k_proj"], ranks["gate"], ranks["shared_expert_gate"]) == (20, 16, 4, 1)
    expected = (
        "a rank of 20 is larger than some matrices, which get all that they can have: "
        "k_proj (16 x 32) gets rank 16, v_proj (16 x 32) gets rank 16"
    )
    assert warnings_of(adapted) == [expected]
    assert f"note: {expected}" in str(adapted.coverage)
    assert warnings_of(attach(tiny_models.MOE["qwen2-moe"](), LoraConfig(r=8))) == []
