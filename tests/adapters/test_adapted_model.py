"""The invariants of an adapted model: adapter off is the base, nothing frozen moves, everything trained does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from veneer.adapters import LoraConfig, LoraLinear, attach
from veneer.errors import AdapterError

# transformers' own notice about the name of a method that both supported versions still have.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EVERYTHING = {
    "default": {},
    "rslora": {"use_rslora": True, "lora_dropout": 0.2},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"modules_to_save": ["model.norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 1, 5]},
    "only tokens": {"target_modules": [], "trainable_token_indices": [3, 1, 5]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1]},
}


def config_of(name, **more):
    return LoraConfig(**{"r": 4, "lora_alpha": 8} | EVERYTHING[name] | more)


def frozen_state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EVERYTHING)
def test_adapter_off_is_the_base_bit_for_bit(llama, ids, run, train, name, tied):
    module = llama(tied=tied)
    base, weights = run(module, ids), frozen_state(module)
    flags = [parameter.requires_grad for parameter in module.parameters()]
    adapted = attach(module, config_of(name), seed=0)
    with adapted.disabled():
        assert torch.equal(run(module, ids), base)
    train(adapted, ids)
    trained = run(module, ids)
    assert not torch.equal(trained, base)
    with adapted.disabled():
        assert torch.equal(run(module, ids), base)
    assert torch.equal(run(module, ids), trained)
    assert adapted.detach() is module
    assert torch.equal(run(module, ids), base)
    after = module.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EVERYTHING)
def test_training_moves_every_trained_tensor_and_no_frozen_one(llama, ids, train, name, tied):
    module = llama(tied=tied)
    base = dict(module.named_parameters())
    weights = {key: p.detach().clone() for key, p in base.items()}
    adapted = attach(module, config_of(name), seed=0)
    start = adapted.state()
    module.train()
    gradients = train(adapted, ids, steps=2)
    names = [key for key, _ in adapted.named_parameters()]
    for key in names:
        assert any(step[key].abs().max() > 0 for step in gradients), f"{key} has no gradient within two steps"
    assert all(not torch.equal(start[key], value) for key, value in adapted.state().items() if key in names)
    assert all(torch.equal(weights[key], p) for key, p in base.items())
    assert all(p.grad is None for p in base.values())


@pytest.mark.parametrize("make", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_default_adapter_changes_no_bit_of_the_logits(request, ids, run, make, dtype):
    module = request.getfixturevalue(make)().to(dtype)
    base = run(module, ids)
    adapted = attach(module, LoraConfig(r=4), seed=0)
    assert torch.equal(run(module, ids), base)
    with adapted.disabled():
        assert torch.equal(run(module, ids), base)


@pytest.mark.parametrize("name", ["orthogonal", "embedding", "saved", "tokens"])
def test_other_fresh_adapters_change_nothing_within_rounding(llama, ids, run, name):
    module = llama(tied=True)
    base = run(module, ids)
    attach(module, config_of(name), seed=0)
    torch.testing.assert_close(run(module, ids), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens"]])
def test_an_adapter_without_initialisation_changes_the_output(llama, ids, run, targets):
    module = llama()
    base = run(module, ids)
    attach(module, LoraConfig(r=4, init_lora_weights=False, target_modules=targets), seed=0)
    assert (run(module, ids) - base).abs().max() > 1e-3


def test_the_same_seed_is_the_same_adapter_whatever_else_is_adapted(llama):
    wide = attach(llama(), LoraConfig(r=4), name="x", seed=7).state()
    narrow = attach(llama(num_hidden_layers=1), LoraConfig(r=4, target_modules=["v_proj"]), seed=7).state()
    other = attach(llama(), LoraConfig(r=4), seed=8).state()
    assert len(narrow) == 2
    assert all(torch.equal(wide[key], value) for key, value in narrow.items())
    key = next(iter(narrow))
    assert not torch.equal(other[key], wide[key])


def test_without_a_seed_the_start_follows_torchs_generator(llama):
    states = []
    for seed in (1, 1, 2):
        module = llama()
        torch.manual_seed(seed)
        states.append(attach(module, LoraConfig(r=4)).parameters()[0].detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_config_is_never_changed(llama, ids, train, tmp_path):
    config = LoraConfig(r=4, rank_pattern={"q_proj": 2}, trainable_token_indices=[3])
    before = copy.deepcopy(config)
    adapted = attach(llama(), config, seed=0)
    train(adapted, ids, steps=1)
    adapted.save(tmp_path / "a")
    assert config == before
    assert adapted.configs["default"] is config


def test_gradients_flow_through_non_reentrant_checkpointing(llama, ids):
    grads = []
    for checkpointed in (False, True):
        module = llama().train()
        adapted = attach(module, LoraConfig(r=4, init_lora_weights=False, trainable_token_indices=[3]), seed=0)
        if checkpointed:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module(ids).logits.float().pow(2).mean().backward()
        grads.append([p.grad for p in adapted.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# Several adapters


def two_adapters(llama, ids, train):
    module = llama(tied=True)
    adapted = attach(module, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), name="a", seed=0)
    train(adapted, ids)
    adapted.add(LoraConfig(r=2, target_modules=["v_proj", "down_proj"]), "b", seed=1)
    return adapted


def test_a_second_adapter_does_not_nest_and_leaves_the_first_alone(llama, ids, run, train):
    adapted = two_adapters(llama, ids, train)
    module = adapted.module
    layers = [m for m in module.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 6
    assert not any(isinstance(layer.base_layer, LoraLinear) for layer in layers)
    first = run(module, ids)
    adapted.use("b")
    with adapted.disabled():
        base = run(module, ids)
    assert torch.equal(run(module, ids), base)  # fresh
    train(adapted, ids)
    second = run(module, ids)
    adapted.use("a")
    assert torch.equal(run(module, ids), first)
    adapted.use("b")
    assert torch.equal(run(module, ids), second)


def test_a_second_adapter_matches_the_modules_that_it_would_match_alone(llama):
    adapted = attach(llama(), LoraConfig(r=4), name="a", seed=0)
    adapted.add(LoraConfig(r=2), "b", seed=0)
    alone = attach(llama(), LoraConfig(r=2), seed=0)
    assert adapted.state("b").keys() == alone.state().keys()


def test_only_the_active_adapter_is_trained(llama, ids, train):
    adapted = two_adapters(llama, ids, train)
    adapted.use("b", "a")
    assert (adapted.active, adapted.active_names) == ("b", ("b", "a"))
    before = adapted.state("a")
    train(adapted, ids)
    assert all(torch.equal(before[key], value) for key, value in adapted.state("a").items())
    assert all(not p.requires_grad for _, p in adapted.named_parameters("a"))
    assert all(p.requires_grad for p in adapted.parameters())


def test_adapters_in_use_together_add_up(llama, ids, run, train):
    adapted = two_adapters(llama, ids, train)
    adapted.use("b")
    train(adapted, ids)
    adapted.use("a", "b")
    both = run(adapted.module, ids)
    layer = adapted.module.model.layers[0].self_attn.v_proj
    x = torch.randn(3, 32)
    a, b = layer.adapters["a"], layer.adapters["b"]
    torch.testing.assert_close(layer(x), x @ (layer.weight + a.delta() + b.delta()).t())
    adapted.use("b", "a")
    torch.testing.assert_close(run(adapted.module, ids), both, rtol=1e-5, atol=1e-6)


def test_adapters_that_replace_the_same_thing_cannot_act_together(llama):
    adapted = attach(llama(tied=True), LoraConfig(trainable_token_indices=[3, 1]), name="a")
    adapted.add(LoraConfig(trainable_token_indices=[5]), "b")
    adapted.add(LoraConfig(trainable_token_indices=[1]), "c")
    adapted.use("a", "b")
    with pytest.raises(AdapterError, match="same token rows"):
        adapted.use("a", "c")
    assert adapted.active_names == ("a", "b")
    saved = attach(llama(), LoraConfig(modules_to_save=["lm_head"]), name="a")
    saved.add(LoraConfig(modules_to_save=["lm_head"]), "b")
    with pytest.raises(AdapterError, match="both replace"):
        saved.use("a", "b")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
        ({"modules_to_save": ["layers.0.mlp"]}, {"target_modules": ["down_proj"]}),
        ({"target_modules": ["down_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp"]}),
        ({"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1]}),
    ],
)
def test_kinds_of_change_do_not_nest_across_adapters(llama, ids, run, first, second):
    module = llama()
    adapted = attach(module, LoraConfig(**first), name="a", seed=0)
    before = [type(m) for m in module.modules()]
    with pytest.raises(AdapterError, match="in another way"):
        adapted.add(LoraConfig(**second), "b")
    assert [type(m) for m in module.modules()] == before
    assert list(adapted.configs) == ["a"]


def test_an_adapter_that_is_removed_leaves_the_others_as_they_are(llama, ids, run, train):
    adapted = two_adapters(llama, ids, train)
    expected = run(adapted.module, ids)
    adapted.remove("b")
    assert torch.equal(run(adapted.module, ids), expected)
    assert sum(isinstance(m, LoraLinear) for m in adapted.module.modules()) == 4
    with pytest.raises(AdapterError, match="there is no adapter 'b'"):
        adapted.use("b")


@pytest.mark.parametrize("name", ["a.b", "", "keys", "a/b"])
def test_a_name_that_cannot_be_kept_is_refused(llama, name):
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        attach(llama(), LoraConfig(), name=name)


def test_a_name_is_given_once(llama):
    adapted = attach(llama(), LoraConfig())
    with pytest.raises(AdapterError, match="already"):
        adapted.add(LoraConfig())


def test_a_model_that_has_adapters_is_not_attached_to_again(llama):
    module = llama()
    attach(module, LoraConfig())
    with pytest.raises(AdapterError, match=r"adapted\.add"):
        attach(module, LoraConfig())


def test_a_misspelt_adapter_gets_the_nearest_name(llama):
    adapted = attach(llama(), LoraConfig(), name="tickets")
    with pytest.raises(AdapterError, match="Did you mean 'tickets'"):
        adapted.use("ticket")


# disabled()


def test_disabled_nests_and_comes_back_after_an_error(llama, ids, run, train):
    module = llama()
    base = run(module, ids)
    adapted = attach(module, LoraConfig(r=4), seed=0)
    train(adapted, ids)
    trained = run(module, ids)
    with adapted.disabled():
        with adapted.disabled():
            assert torch.equal(run(module, ids), base)
        assert torch.equal(run(module, ids), base)
        adapted.use("default")
        assert torch.equal(run(module, ids), base)
    assert torch.equal(run(module, ids), trained)
    with pytest.raises(ZeroDivisionError):
        with adapted.disabled():
            _ = 1 / 0
    assert torch.equal(run(module, ids), trained)
    assert all(p.requires_grad for p in adapted.parameters())


def test_disabled_layers_offer_no_factors_to_fused_blocks(llama):
    adapted = attach(llama(), LoraConfig(r=4, lora_alpha=8))
    layer = adapted.module.model.layers[0].self_attn.q_proj
    (factors,) = layer.active_factors()
    assert factors.A is layer.adapters["default"].A
    assert factors.scaling == 2.0
    with adapted.disabled():
        assert layer.active_factors() == []


# State


def test_state_is_a_copy_and_load_state_restores_it_in_place(llama, ids, run, train):
    adapted = attach(llama(), LoraConfig(r=4, modules_to_save=["model.norm"], trainable_token_indices=[3]), seed=0)
    train(adapted, ids)
    state, expected = adapted.state(), run(adapted.module, ids)
    parameters = adapted.parameters()
    train(adapted, ids)
    assert not torch.equal(run(adapted.module, ids), expected)
    adapted.load_state(state)
    assert torch.equal(run(adapted.module, ids), expected)
    assert all(a is b for a, b in zip(adapted.parameters(), parameters))


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(llama):
    adapted = attach(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), seed=0)
    good = adapted.state()
    first, second = list(good)[:2]
    broken = {
        "missing": {k: v for k, v in good.items() if k != second},
        "unknown": {**good, "base_model.model.model.layers.0.self_attn.q_porj.lora_A.weight": good[first]},
        "expected": {**good, second: good[second][:, :1]},
        "NaN": {**good, second: torch.full_like(good[second], float("nan"))},
    }
    for says, state in broken.items():
        changed = {k: (v + 1 if k == first and says != "NaN" else v) for k, v in state.items()}
        with pytest.raises(AdapterError, match=says):
            adapted.load_state(changed)
        assert all(torch.equal(good[k], v) for k, v in adapted.state().items())


def test_a_renamed_key_is_reported_with_the_nearest_one(llama):
    adapted = attach(llama(), LoraConfig(r=4, target_modules=["q_proj"]), seed=0)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    state = adapted.state()
    state[key.replace("q_proj", "q_porj")] = state.pop(key)
    with pytest.raises(AdapterError) as caught:
        adapted.load_state(state)
    assert "q_porj" in caught.value.what
    assert f"'{key}'" in caught.value.fix


def test_the_keys_are_pefts_and_their_order_is_the_modules(llama):
    config = LoraConfig(r=4, target_modules=["v_proj", "q_proj"], modules_to_save=["model.norm"])
    assert list(attach(llama(num_hidden_layers=1), config).state()) == [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight",
        "base_model.model.model.norm.weight",
    ]


# Any module


def test_any_torch_module_can_be_adapted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    base = net(x).detach()
    adapted = attach(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"]), seed=0)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).pow(2).sum().backward()
        optimizer.step()
    assert net(x).pow(2).sum() < base.pow(2).sum()
    with adapted.disabled():
        assert torch.equal(net(x), base)


def test_a_module_that_hangs_in_two_places_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    adapted = attach(net, LoraConfig(r=2, init_lora_weights=False), seed=0)
    assert net["a"][0] is net["b"][0]
    assert isinstance(net["a"][0], LoraLinear)
    assert len(adapted.state()) == 2
    adapted.detach()
    assert net["a"][0] is net["b"][0] is shared


def test_a_tied_heads_rows_are_the_embeddings(llama, ids, train):
    adapted = attach(llama(tied=True), LoraConfig(target_modules=[], trainable_token_indices=[3, 1]), seed=0)
    assert [tuple(p.shape) for p in adapted.parameters()] == [(2, 32)]
    module = adapted.module
    train(adapted, ids)
    rows = adapted.parameters()[0].detach()
    h = torch.randn(2, 32)
    logits = module.lm_head(h)
    torch.testing.assert_close(logits[:, [3, 1]], h @ rows.t())
    others = [i for i in range(64) if i not in (3, 1)]
    assert torch.equal(logits[:, others], module.lm_head.base_layer(h)[:, others])
    assert torch.equal(module.model.embed_tokens(torch.tensor([1])), rows[1:])


def test_a_head_asked_for_other_tokens_than_its_tied_embedding_has_rows_of_its_own(llama):
    config = LoraConfig(target_modules=[], trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [2, 5, 6]})
    adapted = attach(llama(tied=True), config)
    assert {key: tuple(p.shape) for key, p in adapted.named_parameters()} == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32),
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta": (3, 32),
    }


def test_bfloat16_activations_stay_bfloat16_and_trained_tensors_float32(llama, ids):
    module = llama(tied=True).to(torch.bfloat16)
    config = LoraConfig(r=4, modules_to_save=["model.norm"], trainable_token_indices=[3], init_lora_weights=False)
    adapted = attach(module, config, seed=0)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    out = module(ids, output_hidden_states=True)
    assert out.logits.dtype == torch.bfloat16
    assert {h.dtype for h in out.hidden_states} == {torch.bfloat16}
    out.logits.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.parameters())
