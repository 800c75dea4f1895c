"""Small tensors of a recurrence, trained in full beside LoRA: ``modules_to_save: [A_log, D]``."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge, read_adapter
from veneer.adapters.save import warnings_of
from veneer.errors import AdapterError
from veneer.train.optimizer import FlatAdamW

IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0))
CONFIG = LoraConfig(r=4, modules_to_save=["A_log", "D"])


def hybrid(dtype: torch.dtype = torch.float32) -> nn.Module:
    module: nn.Module = tiny_models.HYBRID["bamba"]()
    return module.to(dtype).eval()


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(IDS).logits
    return out


def trained(adapted: AdaptedModel, steps: int = 3) -> AdaptedModel:
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        out = adapted.module(IDS).logits[:, :-1].float()
        nn.functional.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
    return adapted


def mixers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if "A_log" in part._parameters and hasattr(part, "conv1d")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_trained_beside_lora_and_switched_off_bit_for_bit(dtype: torch.dtype) -> None:
    module = hybrid(dtype)
    base, before = logits(module), copy.deepcopy(module.state_dict())
    adapted = attach(module, CONFIG, seed=0)
    assert torch.equal(logits(module), base)
    names = [key for key, _ in adapted.named_parameters()]
    assert sum(key.endswith((".A_log", ".D")) for key in names) == 2 * len(mixers(module)) > 0
    assert any(key.endswith("mamba.in_proj.lora_A.weight") for key in names)
    trained(adapted)
    for key, parameter in adapted.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
        assert parameter.dtype == torch.float32
    assert not torch.equal(logits(module), base)
    assert logits(module).dtype == base.dtype
    with adapted.disabled():
        assert torch.equal(logits(module), base)
    adapted.detach()
    assert torch.equal(logits(module), base)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any("forward" in part.__dict__ for part in mixers(module))


def test_what_is_trained_is_what_the_mixer_reads() -> None:
    """The same numbers written into the base itself give the same logits."""
    adapted = trained(
        attach(hybrid(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["A_log", "D"]), seed=0)
    )
    plain = hybrid()
    with torch.no_grad():
        for key, tensor in adapted.state().items():
            if key.endswith((".A_log", ".D")):
                plain.get_parameter(key.removeprefix("base_model.model.")).copy_(tensor)
    q = {key: tensor for key, tensor in adapted.state().items() if "lora" in key}
    other = attach(plain, LoraConfig(r=4, target_modules=["q_proj"]), seed=0)
    other.load_state(q)
    torch.testing.assert_close(logits(other.module), logits(adapted.module), rtol=1e-6, atol=1e-6)


def test_saving_loading_and_merging(tmp_path: Path) -> None:
    adapted = trained(attach(hybrid(), CONFIG, seed=0))
    expected = logits(adapted.module)
    adapted.save(tmp_path / "adapter")
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["modules_to_save"] is None
    record = json.loads((tmp_path / "adapter" / "veneer.json").read_text())
    assert len(record["parameters_to_save"]) == 2 * len(mixers(adapted.module))
    assert any("has no place for A_log, D" in line for line in record["not_in_peft"])
    assert any("has no place for A_log, D" in line for line in warnings_of(adapted))
    config, tensors = read_adapter(tmp_path / "adapter")
    assert sum(key.endswith(".A_log") for key in tensors) == len(mixers(adapted.module))
    again = load_adapter(hybrid(), tmp_path / "adapter")
    assert torch.equal(logits(again.module), expected)
    merged = merge(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(hybrid().state_dict())
    assert torch.equal(logits(adapted.module), expected)  # which stays as it is
    assert list(config.modules_to_save or ()) == record["parameters_to_save"]


def test_two_adapters_have_their_own_and_do_not_act_together() -> None:
    adapted = trained(attach(hybrid(), CONFIG, seed=0))
    first = logits(adapted.module)
    adapted.add(LoraConfig(r=2, modules_to_save=["D"]), "second", seed=1)
    with pytest.raises(AdapterError, match="both replace D of this module"):
        adapted.use("default", "second")
    adapted.use("second")
    second = logits(trained(adapted).module)
    adapted.use("default")
    assert torch.equal(logits(adapted.module), first)
    assert not torch.equal(first, second)
    adapted.add(LoraConfig(r=2, target_modules=["in_proj"]), "third", seed=2)  # inside of a mixer that has a slot
    adapted.remove("second")
    assert torch.equal(logits(adapted.module), first)


def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return 2 * type(self).forward(self, *args, **kwargs)


@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_that_others_have_put_onto_the_module_is_called_and_comes_back(bound: bool) -> None:
    module = hybrid()
    mixer = mixers(module)[0]
    forward: Any = types.MethodType(doubled, mixer) if bound else functools.partial(doubled, mixer)
    mixer.forward = forward
    base = logits(module)
    assert not torch.equal(base, logits(hybrid()))
    adapted = attach(module, CONFIG, seed=0)
    assert torch.equal(logits(module), base)
    expected = logits(trained(adapted).module)
    assert not torch.equal(expected, base)
    with adapted.disabled():
        assert torch.equal(logits(module), base)
    again = pickle.loads(pickle.dumps(module)) if bound is False else copy.deepcopy(module)
    assert torch.equal(logits(again), expected)
    merged = merge(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    own: Any = mixers(merged)[0].__dict__["forward"]
    assert (own.__self__ if bound else own.args[0]) is mixers(merged)[0]
    adapted.detach()
    assert mixer.__dict__["forward"] is forward
    assert torch.equal(logits(module), base)


def test_a_forward_that_others_have_wrapped_meanwhile_stays_theirs() -> None:
    module = hybrid()
    base, adapted = logits(module), attach(module, CONFIG, seed=0)
    trained(adapted)
    mixer = mixers(module)[0]
    within, calls = mixer.forward, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return within(*args, **kwargs)

    mixer.__dict__["forward"] = wrapped
    adapted.detach()
    assert torch.equal(logits(module), base)
    assert calls
    assert mixer.__dict__["forward"] is wrapped


def test_two_adapters_that_train_different_ones_of_a_module_act_together() -> None:
    adapted = attach(hybrid(), LoraConfig(r=2, modules_to_save=["A_log"]), name="first", seed=0)
    adapted.add(LoraConfig(r=2, modules_to_save=["D"]), "second", seed=1)
    trained(adapted)
    alone = logits(adapted.module)
    adapted.use("second")
    trained(adapted)
    adapted.use("first", "second")
    both = logits(adapted.module)
    assert not torch.equal(both, alone)
    torch.testing.assert_close(logits(merge(adapted)), both, rtol=1e-4, atol=1e-5)
    adapted.remove("second")
    assert torch.equal(logits(adapted.module), alone)


STACKS = {"target_modules": ["q_proj"], "modules_to_save": ["experts.down_proj"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": "all", "modules_to_save": ["down_proj"]},
        {"experts": "all", **STACKS},
        {"target_parameters": ["experts.gate_up_proj"], **STACKS},
    ],
)
def test_a_stack_of_experts_has_factors_or_is_trained_in_full(settings: dict[str, Any]) -> None:
    module = tiny_models.MOE["qwen3-moe"]().eval()
    with pytest.raises(AdapterError, match="Experts cannot be changed in two ways by one adapter") as refused:
        attach(module, LoraConfig(r=4, **settings), seed=0)
    assert str(refused.value.where).endswith("mlp.experts")
    assert "modules_to_save (down_proj)" in str(refused.value.fix)
    base = logits(module)
    adapted = attach(module, LoraConfig(r=4, **STACKS), seed=0)  # which finds the model as it was
    assert any(key.endswith("experts.down_proj") for key, _ in adapted.named_parameters())
    assert torch.equal(logits(module), base)
    assert not torch.equal(logits(trained(adapted).module), base)
    adapted.detach()
    assert torch.equal(logits(module), base)


def test_an_adapter_that_fails_on_its_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = hybrid()
    base, parts = logits(module), [type(part) for part in module.modules()]
    first = attach(module, LoraConfig(r=2, target_modules=["q_proj"]), seed=0, name="first")
    there = [type(part) for part in module.modules()]

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("veneer.adapters.saved_parameters.SavedParameters.add", full)
        with pytest.raises(torch.OutOfMemoryError):
            first.add(CONFIG, "second")
        assert [type(part) for part in module.modules()] == there
        assert list(first.configs) == ["first"]
        first.detach()
        with pytest.raises(torch.OutOfMemoryError):
            attach(module, CONFIG, seed=0)
    assert [type(part) for part in module.modules()] == parts
    assert all(parameter.requires_grad for parameter in module.parameters())
    attach(module, CONFIG, seed=0).detach()
    assert torch.equal(logits(module), base)


@pytest.mark.parametrize("name", ["dt_bias", "0.mamba.A_log"])
def test_the_coverage_shows_them(name: str) -> None:
    adapted = attach(hybrid(), LoraConfig(r=4, modules_to_save=[name]), seed=0)
    text = str(adapted.coverage)
    last = name.rpartition(".")[2]
    row = next(line for line in text.splitlines() if line.split()[:1] == [last])
    assert "whole" in row
    if last == "dt_bias":
        assert "not adapted: dt_bias" not in text


def test_of_a_mixer_that_is_saved_whole_they_are_part() -> None:
    adapted = attach(hybrid(), LoraConfig(r=4, modules_to_save=["mamba", "A_log"]), seed=0)
    assert not adapted.plans["default"].parameters
    assert any(path.endswith("mamba") for path in adapted.plans["default"].saved)


def test_the_weight_of_a_layer_is_no_such_parameter() -> None:
    with pytest.raises(AdapterError, match="is a parameter of Linear, which is saved as a whole"):
        attach(hybrid(), LoraConfig(r=4, modules_to_save=["in_proj.weight"]), seed=0)


@pytest.mark.parametrize(("entry", "meant"), [("A_logg", "'A_log'"), ("dt_bia", "'dt_bias'"), ("mambaa", "'mamba'")])
def test_a_name_that_is_nearly_one_is_told_once(entry: str, meant: str) -> None:
    with pytest.raises(AdapterError, match="matches nothing in the base") as refused:
        attach(hybrid(), LoraConfig(r=4, modules_to_save=[entry]), seed=0)
    assert str(refused.value.fix).startswith(f"Did you mean {meant}")
    with pytest.raises(AdapterError) as refused:
        attach(hybrid(), LoraConfig(r=4, modules_to_save=["model.norm"]), seed=0)
    said = str(refused.value.fix).removeprefix("Did you mean ").removesuffix("?").split(" or ")
    assert len(said) == len(set(said)) > 0


@pytest.mark.parametrize("entry", ["sinks", "0.self_attn.sinks"])
def test_sinks_which_attention_gives_no_gradient_are_refused(entry: str) -> None:
    with pytest.raises(AdapterError, match=f"'{entry}' cannot be trained: the attention of a run reads sinks"):
        attach(tiny_models.MOE["gpt-oss"](), LoraConfig(r=4, modules_to_save=[entry]), seed=0)


@pytest.mark.parametrize("entry", ["A_log", "mamba"])
@pytest.mark.parametrize("name", ["bamba", "jamba"])
def test_weight_decay_pulls_no_speed_of_forgetting_to_zero(entry: str, name: str) -> None:
    """The first Mamba has a matrix of them (Jamba's), the second a vector (Bamba's)."""
    adapted = attach(tiny_models.HYBRID[name](), LoraConfig(r=4, modules_to_save=[entry, "D"]), seed=0)
    before = adapted.state()
    optimizer = FlatAdamW(adapted.named_parameters(), weight_decay=0.5)
    optimizer.step(0.1)
    moved = {key for key, value in adapted.state().items() if not torch.equal(value, before[key])}
    own = {key for key in before if key.endswith((".A_log", ".D", ".dt_bias"))}
    assert {key.rpartition(".")[2] for key in own} >= {"A_log", "D"}
    assert not own & moved
    assert all(key in moved for key in before if key.endswith(("lora_A.weight", ".in_proj.weight")))


def test_it_can_be_looked_into_and_resized(tmp_path: Path) -> None:
    from veneer.ship.inspect import inspect_adapter
    from veneer.ship.resize import resize_adapter

    adapted = trained(attach(hybrid(), CONFIG, seed=0))
    adapted.save(tmp_path / "old")
    found = inspect_adapter(tmp_path / "old", compare=False)
    assert sum(key.endswith((".A_log", ".D")) for key in found.others) == 2 * len(mixers(adapted.module))
    resize_adapter(tmp_path / "old", tmp_path / "new", rank=2)
    again = load_adapter(hybrid(), tmp_path / "new")
    for key, tensor in again.state().items():
        if key.endswith((".A_log", ".D")):
            assert torch.equal(tensor, adapted.state()[key])
        elif key.endswith("lora_A.weight"):
            assert len(tensor) == 2
