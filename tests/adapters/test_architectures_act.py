"""Adapters on tiny random models of the real classes: they act, they train, they merge, and PEFT reads their files."""

from __future__ import annotations

import json
import re

import pytest
import tiny_models
import torch

from veneer.adapters import LoraConfig, attach, load_adapter
from veneer.adapters.merge import merge
from veneer.adapters.save import _say_once

# float32, the same formula summed in another order; a scan over the tokens adds up more of it
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

# What PEFT 0.21 does not do: it refuses out_proj beside some state spaces by their model type, and a dt_proj whose
# weight is read never asks its adapter.
NOT_IN_PEFT = {
    "jamba": ["dt_proj"],
    "mamba": ["dt_proj", "out_proj"],
    "nemotron-h": ["out_proj"],
    "falcon-h1": ["out_proj"],
}
IDS = torch.tensor([[3, 7, 5, 3, 9, 11, 20, 33, 14, 2, 6, 41], [8, 3, 4, 52, 17, 9, 30, 13, 21, 40, 5, 19]])


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS).logits


def randomise(parameters):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def adapted(name, **settings):
    model = attach(tiny_models.ALL[name](), LoraConfig(r=4, **settings), seed=0)
    randomise(model.parameters())
    return model


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_switched_off_is_the_base_bit_for_bit(name):
    module = tiny_models.ALL[name]()
    expected = logits(module)
    model = attach(module, LoraConfig(r=4), seed=0)
    torch.testing.assert_close(logits(module), expected, **TOLERANCE)
    randomise(model.parameters())
    assert (logits(module) - expected).abs().max() > 1e-2
    with model.disabled():
        assert torch.equal(logits(module), expected)
    assert torch.equal(logits(model.detach()), expected)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_gradients_reach_every_adapted_tensor_in_training_mode(name):
    model = adapted(name)
    many = torch.randint(64, (2, 56), generator=torch.Generator().manual_seed(3))  # a sure router has no gradient
    out = model.module.train()(input_ids=many).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    dead = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_merged_is_unmerged(name):
    model = adapted(name)
    torch.testing.assert_close(logits(merge(model)), logits(model.module), **TOLERANCE)


@pytest.mark.parametrize("name", tiny_models.ALL)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
def test_peft_reads_the_file_and_writes_one_that_is_read_with_the_same_logits(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(name, exclude_modules=NOT_IN_PEFT.get(name))
    expected = logits(model.module)
    model.save(tmp_path / "ours")
    assert not json.loads((tmp_path / "ours" / "veneer.json").read_text()).get("not_in_peft")
    theirs = peft.PeftModel.from_pretrained(tiny_models.ALL[name](), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs), expected, **TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tiny_models.ALL[name](), tmp_path / "theirs")
    torch.testing.assert_close(logits(again.module), expected, **TOLERANCE)


@pytest.mark.parametrize("name", NOT_IN_PEFT)
def test_what_peft_does_not_compute_is_said_when_it_is_saved_with_the_way_out(name, tmp_path, caplog):
    _say_once.cache_clear()
    adapted(name).save(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "veneer.json").read_text())["not_in_peft"]
    assert [record.getMessage() for record in caplog.records] == said
    for layer in NOT_IN_PEFT[name]:
        assert any(re.search(rf"\({layer}, \d modules\).* exclude_modules: \[{layer}\]", line) for line in said)


def test_dora_on_the_layers_beside_experts_is_said_not_to_be_in_peft(tmp_path):
    adapted("deepseek-v3", use_dora=True).save(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "veneer.json").read_text())["not_in_peft"]
    assert len(said) == 1
    assert "takes them for the experts" in said[0]


@pytest.mark.parametrize("name", ["jamba", "mamba", "falcon-h1", "zamba2", "deepseek-v3"])
def test_a_saved_adapter_gives_the_same_logits_when_it_is_loaded_where_peft_cannot(name, tmp_path):
    model = adapted(name)
    model.save(tmp_path / "a")
    again = load_adapter(tiny_models.ALL[name](), tmp_path / "a")
    torch.testing.assert_close(logits(again.module), logits(model.module), **TOLERANCE)


@pytest.mark.parametrize("name", ["jamba", "mamba"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_on_a_projection_whose_weight_is_read_acts_as_if_it_were_merged(name, settings):
    model = adapted(name, target_modules=["dt_proj"], **settings)
    with model.disabled():
        base = logits(model.module)
    changed = logits(model.module)
    assert (changed - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(merge(model)), changed, **TOLERANCE)


def test_layers_with_one_weight_share_their_factors_and_stay_one_when_they_are_merged():
    model = adapted("zamba2")
    first, second = (model.module.model.layers[i].shared_transformer.self_attn.q_proj for i in (1, 3))
    assert first.adapters["default"] is second.adapters["default"]
    assert not any("layers.3.shared_transformer" in key for key, _ in model.named_parameters())
    merged = merge(model)
    one, other = (merged.model.layers[i].shared_transformer.self_attn.q_proj.weight for i in (1, 3))
    assert one is other
    model.remove("default")
    assert type(model.module.model.layers[3].shared_transformer.self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("name", "whole"),
    [("mixtral", "gate"), ("gpt-oss", "router"), ("bamba", "conv1d"), ("bamba", "mamba"), ("qwen3-moe", "gate")],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
def test_a_router_a_convolution_or_a_state_space_is_trained_whole_and_peft_reads_it(name, whole, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(name, target_modules=["q_proj", "o_proj"], modules_to_save=[whole])
    out = model.module(input_ids=IDS).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    grads = [p.grad for key, p in model.named_parameters() if f".{whole}." in key]
    assert grads
    assert all(grad is not None and grad.any() for grad in grads)
    model.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny_models.ALL[name](), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model.module), **TOLERANCE)
    torch.testing.assert_close(logits(merge(model)), logits(model.module), **TOLERANCE)
