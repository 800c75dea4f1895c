"""Merged is unmerged to a tolerance, the base is never written to, ties are kept or said."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from veneer.adapters import LoraConfig, LoraEmbedding, LoraLinear, attach, merge, merge_report
from veneer.adapters.merge import compare_logits
from veneer.errors import AdapterError

CASES = {
    "all-linear": ("tied", {}),
    "rslora with patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "conv1d": ("gpt2", {}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "saved": ("llama", {"modules_to_save": ["model.norm", "layers.0.mlp"]}),
    "saved tied head": ("tied", {"modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"trainable_token_indices": [5, 1, 3]}),
    "tied tokens": ("tied", {"trainable_token_indices": [5, 1, 3]}),
    "tied, other tokens": ("tied", {"trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [1, 3, 7]}}),
}
UNTIED = {"tied embedding", "tied head", "saved tied head", "tied, other tokens"}


@pytest.fixture
def make(llama, gpt2):
    return {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2}


def trained(base, settings, ids, train, dtype=torch.float32):
    adapted = attach(base.to(dtype), LoraConfig(**{"r": 4, "lora_alpha": 8} | settings), seed=0)
    train(adapted, ids, steps=4)
    return adapted


@pytest.mark.parametrize("case", CASES)
def test_merged_is_unmerged_and_the_base_is_not_written_to(case, make, ids, run, train):
    kind, settings = CASES[case]
    module = make[kind]()
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    base = run(module, ids)
    adapted = trained(module, settings, ids, train)
    expected = run(module, ids)
    assert (expected - base).abs().max() > 1e-2
    merged = merge(adapted)
    torch.testing.assert_close(run(merged, ids), expected, rtol=1e-4, atol=2e-5)
    assert merged is not module
    assert {type(m).__module__.partition(".")[0] for m in merged.modules()} <= {"torch", "transformers"}
    assert merged.state_dict().keys() == weights.keys()
    assert torch.equal(run(module, ids), expected)  # the adapted model goes on as before
    with adapted.disabled():
        assert torch.equal(run(module, ids), base)
    adapted.detach()
    assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_survives_save_and_load(case, make, ids, run, train, tmp_path):
    kind, settings = CASES[case]
    adapted = trained(make[kind](), settings, ids, train)
    merged = merge(adapted)
    expected = run(merged, ids)
    merged.save_pretrained(tmp_path / "m")
    again = type(merged).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(run(again, ids), expected)
    was_tied = kind != "llama"
    assert merged.config.tie_word_embeddings == (was_tied and case not in UNTIED)
    assert adapted.module.config.tie_word_embeddings == was_tied  # only the merged model's config is changed
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert tied == (was_tied and case not in UNTIED)


def test_untouched_tensors_are_shared_and_merged_ones_are_not(llama, ids, train):
    adapted = trained(llama(), {"target_modules": ["q_proj"]}, ids, train)
    merged = merge(adapted)
    layer, other = merged.model.layers[0], adapted.module.model.layers[0]
    assert layer.mlp.up_proj.weight is other.mlp.up_proj.weight
    assert layer.self_attn.q_proj.weight is not other.self_attn.q_proj.weight
    assert not any(p.requires_grad for p in merged.parameters())


def test_a_bfloat16_weight_is_rounded_once(llama):
    """The sum is made in float32: W and s B A are not rounded before it."""
    adapted = attach(llama().to(torch.bfloat16), LoraConfig(r=4, init_lora_weights=False), seed=0)
    merged = merge(adapted)
    layer = adapted.module.model.layers[1].mlp.up_proj
    factors = layer.adapters["default"]
    expected = (layer.weight.double() + factors.scaling * factors.B.double() @ factors.A.double()).bfloat16()
    got = merged.model.layers[1].mlp.up_proj.weight
    assert got.dtype == torch.bfloat16
    # float32 against double before the rounding: a value on the edge of two bfloat16 numbers may fall to the other side
    assert (got != expected).float().mean() < 1e-3


def test_one_of_several_adapters_or_their_sum_can_be_merged(llama, ids, run, train):
    adapted = trained(llama(), {"target_modules": ["q_proj", "v_proj"]}, ids, train)
    adapted.add(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "b", seed=1)
    for names in (("default",), ("b",), ("default", "b")):
        adapted.use(*names)
        merged = merge(adapted) if len(names) > 1 else merge(adapted, name=names[0])
        torch.testing.assert_close(run(merged, ids), run(adapted.module, ids), rtol=1e-4, atol=2e-5)
    with pytest.raises(AdapterError, match="there is no adapter 'c'"):
        merge(adapted, name="c")


@pytest.mark.parametrize("kind", ["NaN", "too large for float16"])
def test_a_merge_that_is_not_finite_is_refused_with_the_layers_name(llama, kind):
    dtype = torch.float32 if kind == "NaN" else torch.float16
    adapted = attach(llama().to(dtype), LoraConfig(r=4, init_lora_weights=False), seed=0)
    with torch.no_grad():
        factors = adapted.module.model.layers[1].mlp.up_proj.adapters["default"]
        factors.B[0, 0] = float("nan") if kind == "NaN" else 1e9
    with pytest.raises(AdapterError) as caught:
        merge(adapted)
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


def test_a_tie_of_other_layers_that_would_come_apart_is_refused():
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    net = torch.nn.ModuleDict({"a": first, "b": second})
    adapted = attach(net, LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    with pytest.raises(AdapterError, match="share one parameter"):
        merge(adapted)


def test_the_report_measures_the_drift(llama, ids, run, train):
    adapted = trained(llama(), {}, ids, train)
    report = merge_report(adapted, merge(adapted), ids)
    assert report.positions == ids.numel()
    assert 0 <= report.max_abs_logit_difference < 1e-4
    assert abs(report.mean_kl) < 1e-6
    assert report.top1_agreement == 1.0

    with adapted.disabled():
        base = merge_report(adapted, adapted.module, ids)
    assert (base.max_abs_logit_difference, base.top1_agreement) == (0.0, 1.0)

    other = attach(llama(), LoraConfig(r=4, init_lora_weights=False), seed=3)
    far = merge_report(other, merge(adapted), ids)
    p, q = (run(m, ids).log_softmax(-1) for m in (other.module, merge(adapted)))
    assert far.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert far.mean_kl > 1e-3
    assert "KL" in str(far)


def test_the_report_counts_unmasked_positions_only(llama, ids, train):
    adapted = trained(llama(), {}, ids, train)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    assert merge_report(adapted, merge(adapted), ids, mask).positions == int(mask.sum())


def test_merging_leaves_no_adapter_layer_behind(llama, ids, train):
    merged = merge(trained(llama(), {"target_modules": ["embed_tokens", "q_proj"]}, ids, train))
    assert not any(isinstance(m, LoraLinear | LoraEmbedding) for m in merged.modules())
    attach(merged, LoraConfig(r=2))  # it can be adapted again


def test_the_comparison_is_the_formula_whatever_parts_and_chunks_it_comes_in(monkeypatch):
    torch.manual_seed(0)
    before, targets = torch.randn(37, 64), torch.randint(64, (37,))
    after = before + 0.1 * torch.randn(37, 64)
    p, q = (logits.double().log_softmax(-1) for logits in (before, after))
    whole = compare_logits([(before, after, targets)], torch.bfloat16)
    assert whole.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
    assert whole.top1_agreement == float((before.argmax(-1) == after.argmax(-1)).double().mean()) < 1
    assert whole.max_abs_logit_difference == float((before - after).abs().max())
    for logp, found in ((p, whole.perplexity_before), (q, whole.perplexity)):
        assert found == pytest.approx(float(torch.exp(-logp.gather(1, targets[:, None]).mean())), rel=1e-9)
    assert (whole.positions, whole.dtype) == (37, "bfloat16")
    assert f"{whole.perplexity:.5g} ({whole.perplexity_before:.5g} before)" in str(whole)

    monkeypatch.setattr(import_module("veneer.adapters.merge"), "_CHUNK_NUMBERS", 64 * 5)
    parts = [(before[i : i + 17], after[i : i + 17], targets[i : i + 17]) for i in (0, 17, 34)]
    assert compare_logits(parts, torch.bfloat16).mean_kl == pytest.approx(whole.mean_kl, rel=1e-9)
    without = compare_logits([(*parts[0][:2], None), *parts[1:]], torch.bfloat16)
    assert (without.perplexity, without.perplexity_before) == (None, None)
    assert "perplexity" not in str(without)


def test_a_small_drift_is_not_lost_in_the_sum_over_a_large_vocabulary():
    """In float32 this KL of about 5e-11 drowns in rounding, and may come out below zero."""
    torch.manual_seed(0)
    before = torch.randn(8, 50_000).double()
    after = before + 1e-5 * torch.randn(8, 50_000)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    found = compare_logits([(before, after, None)], torch.float32).mean_kl
    assert found == pytest.approx(expected, rel=1e-3)
    assert 1e-11 < found < 1e-10


def test_what_a_training_forward_leaves_in_the_model_is_no_obstacle(ids):
    """RecurrentGemma keeps its states in attributes, and they belong to the graph."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "lru_width": 32, "intermediate_size": 48, "vocab_size": 64, "attention_window_size": 16}
    config = RecurrentGemmaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, **size)
    adapted = attach(RecurrentGemmaForCausalLM(config).eval(), LoraConfig(r=4, init_lora_weights=False), seed=0)
    expected = adapted.module(ids).logits
    left = [v for m in adapted.module.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert any(not tensor.is_leaf for tensor in left)
    merged = merge(adapted)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=2e-5)
    expected.square().mean().backward()  # the graph is whole
    assert all(p.grad is not None for p in adapted.parameters())
