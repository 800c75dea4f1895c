"""Decoder layers whose residual and norm are one operation: taken where the layer computes just that."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fused import packed, tiny
from test_fused_attention import adapted, loss_and_gradients
from torch import Tensor, nn

from veneer.models import fused_layer
from veneer.models.fused import fuse
from veneer.models.head import hidden_states, settle_documents
from veneer.train.activations import gradient_checkpointing

TAKEN = ["Llama", "Mistral", "Qwen2", "Gemma", "Qwen3", "Phi3"]
LEFT_ALONE = ["Gemma2", "Gemma3", "Granite", "Cohere", "Olmo2", "GPTNeoX", "GPT2"]  # other norms, or a factor


def fused_layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if getattr(m.__dict__.get("forward"), "__func__", None) is fused_layer._forward]


@pytest.mark.parametrize("family", TAKEN)
@pytest.mark.parametrize("use_dora", [False, True])
def test_loss_and_gradients_are_those_of_the_layers_own_code(
    family: str, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    fuse(model)
    assert len(fused_layers(model)) == 2
    settle_documents(model)
    calls = []
    original = fused_layer.add_rms_norm
    monkeypatch.setattr(fused_layer, "add_rms_norm", lambda *a: (calls.append(1), original(*a))[1])
    loss, gradients = loss_and_gradients(adapted(model, use_dora=use_dora))
    assert len(calls) == 2
    plain = tiny(family)
    monkeypatch.setattr("veneer.models.fused.fuse_layer", lambda layer: False)
    fuse(plain)
    assert not fused_layers(plain)
    expected, wanted = loss_and_gradients(adapted(plain, use_dora=use_dora))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_a_layer_of_another_form_keeps_its_own_code(family: str) -> None:
    model = tiny(family, **({"residual_multiplier": 0.5} if family == "Granite" else {}))
    fuse(model)
    assert not fused_layers(model)


def kept_rows(use_dora: bool, layers: int) -> list[Tensor]:
    """What a step keeps of the residual's width, each memory once."""
    model = tiny("Llama", num_hidden_layers=layers)
    fuse(model)
    found: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        if t.shape[-1] == 32 and t.numel() == 19 * 32:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        hidden_states(adapted(model, use_dora=use_dora).module, packed([7, 3, 9]))
    return list(found.values())


@pytest.mark.parametrize("layers", [2, 4])
def test_dora_keeps_one_more_row_of_the_residuals_width_for_each_layer_and_not_two(layers: int) -> None:
    """It keeps what attention and the MLP add to the residual; the sum with the first of them is made again."""
    plain, dora = (len(kept_rows(use_dora, layers)) for use_dora in (False, True))
    assert dora - plain == layers + 1  # what the first layer reads needs no gradient, and is kept for the sum alone


def test_with_layers_computed_twice_or_another_norm_the_layers_own_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama")
    fuse(model)
    settle_documents(model)
    found = adapted(model)
    monkeypatch.setattr(fused_layer, "add_rms_norm", None)  # calling it would raise
    model.train()
    with gradient_checkpointing(model, "full"):
        loss_and_gradients(found)
    handles = [layer.post_attention_layernorm.register_forward_hook(lambda *_: None) for layer in fused_layers(model)]
    loss_and_gradients(found)
    for handle in handles:
        handle.remove()
    with pytest.raises(TypeError):
        loss_and_gradients(found)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = tiny("Llama")
    fuse(model)
    for layer in fused_layers(copy.deepcopy(model)):
        assert layer.forward.__self__ is layer
