"""Attention with fused projections and rotation: taken where the block computes just that, with its own arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fused import packed, tiny
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.models import fused_attention, fused_mlp
from veneer.models.fused import fuse
from veneer.models.head import answer_loss, hidden_states, settle_documents

TAKEN = ["Llama", "Mistral", "Qwen2", "Gemma", "Gemma2", "Granite", "Qwen3", "Gemma3", "Phi3", "Olmo2"]
LEFT_ALONE = ["Cohere", "GPTNeoX", "GPT2"]


def fused_blocks(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if fused_attention._ATTRIBUTE in m.__dict__]


def adapted(module: nn.Module, **settings: object) -> AdaptedModel:
    found = attach(module, LoraConfig(r=4, init_lora_weights=False, **settings), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for _, parameter in found.named_parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return found


def loss_and_gradients(model: AdaptedModel) -> tuple[Tensor, dict[str, Tensor]]:
    batch = packed([7, 3, 9])
    loss = answer_loss(model.module, hidden_states(model.module, batch), batch.targets).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", TAKEN)
@pytest.mark.parametrize("use_dora", [False, True])
def test_loss_and_gradients_are_those_of_the_blocks_own_code(
    family: str, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own attention forward, over our attention and with the same adapters, is the oracle."""
    model = tiny(family)
    fuse(model)
    assert len(fused_blocks(model)) == 2
    settle_documents(model)
    calls = []
    original = fused_attention.qkv_rope
    monkeypatch.setattr(fused_attention, "qkv_rope", lambda *a: (calls.append(1), original(*a))[1])
    loss, gradients = loss_and_gradients(adapted(model, use_dora=use_dora))
    assert len(calls) == 2
    plain = tiny(family)
    monkeypatch.setattr("veneer.models.fused.fuse_attention", lambda block: False)
    monkeypatch.setattr("veneer.models.fused.fuse_layer", lambda layer: False)
    fuse(plain)
    assert not fused_blocks(plain)
    expected, wanted = loss_and_gradients(adapted(plain, use_dora=use_dora))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() < 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "up_proj"], ["gate_proj", "down_proj"]])
def test_some_targets_and_several_adapters_are_fused_too(
    targets: list[str], adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no adapter counts as one of rank zero, and several as one of the sum of their ranks."""

    def measured() -> tuple[Tensor, dict[str, Tensor], int]:
        model = adapted(fused("Qwen2"), target_modules=targets)
        if adapters == 2:
            model.add(LoraConfig(r=2, lora_alpha=7, init_lora_weights=False), "second", seed=1)
            model.use("default", "second")
        settle_documents(model.module)
        calls = []
        for where, name in ((fused_attention, "qkv_rope"), (fused_mlp, "gated_mlp")):
            original = getattr(where, name)
            monkeypatch.setattr(where, name, lambda *a, original=original: (calls.append(1), original(*a))[1])
        return *loss_and_gradients(model), len(calls)

    loss, gradients, calls = measured()
    assert calls == 4
    for where in (fused_attention, fused_mlp):
        monkeypatch.setattr(where, "low_rank_of", lambda *_: None)
    expected, wanted, calls = measured()
    assert calls == 0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() < 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_attention_of_another_form_keeps_its_own_code(family: str) -> None:
    model = tiny(family)
    fuse(model)
    assert not fused_blocks(model)


def test_what_the_block_tells_attention_is_taken_from_its_own_forward() -> None:
    window = fused_blocks(fused("Mistral"))[0].__dict__[fused_attention._ATTRIBUTE].arguments
    assert window["sliding_window"] == 5
    first, second = (b.__dict__[fused_attention._ATTRIBUTE].arguments for b in fused_blocks(fused("Gemma2")))
    assert first["softcap"] == second["softcap"] == 50.0
    assert (first["sliding_window"], second["sliding_window"]) == (5, None)  # they alternate
    assert first["scaling"] == 8**-0.5


def test_a_clamp_that_small_numbers_do_not_reach_is_seen() -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    for clip, expected in ((None, 1), (50.0, 0)):
        model = OlmoForCausalLM(OlmoConfig(**settings, num_attention_heads=4, clip_qkv=clip)).eval()
        fuse(model)
        assert len(fused_blocks(model)) == expected


def test_a_copy_computes_with_its_own_weights() -> None:
    model = fused("Llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for block in fused_blocks(twin):
        assert block.forward.__self__ is block


def test_without_documents_or_with_a_cache_the_block_runs_its_own_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(fused("Llama"))
    settle_documents(model.module)
    monkeypatch.setattr(fused_attention, "qkv_rope", None)  # calling it would raise
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    model.module(ids)
    model.module.generate(ids, max_new_tokens=2, do_sample=False)
    with pytest.raises(TypeError):
        hidden_states(model.module, packed([4, 5]))


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_norm_that_somebody_listens_to_runs_by_itself(name: str) -> None:
    model, batch = fused("Qwen3"), packed([4, 5])
    expected = hidden_states(model, batch)
    heard: list[object] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        norm = getattr(model.model.layers[0].self_attn, name)
        handle = getattr(norm, register)(lambda *given: heard.append(given))
        torch.testing.assert_close(hidden_states(model, batch), expected, rtol=1e-5, atol=1e-5)
        handle.remove()
    assert len(heard) == 2
    hidden_states(model, batch)
    assert len(heard) == 2


def fused(family: str) -> nn.Module:
    model = tiny(family)
    fuse(model)
    return model
