"""What follows an adapted layer may write over its output, as it may after the layer itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.kernels import lora_linear
from veneer.kernels.gated_mlp import LowRankLinear, gated_mlp
from veneer.quant import QuantConfig, QuantizedLinear

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "LoRA-FA": {"use_lora_fa": True},
}


class Negated(nn.Module):
    """``relu(-2 x)``, in the place of x or not: what x was cannot be told from it."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(-2).relu_() if self.inplace else torch.relu(x * -2)


def stirred(module: nn.Module, **settings: Any) -> AdaptedModel:
    adapted = attach(module, LoraConfig(r=4, **settings), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def gradients(adapted: AdaptedModel, out: Tensor, x: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((out * weights).sum(), [x, *adapted.parameters()]))


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10)])
@pytest.mark.parametrize("how", ["kept", "checkpointed", "checkpointed to the end"])
@pytest.mark.parametrize("stored", ["bias", "no bias", "codes"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_in_place_operation_after_a_layer_changes_no_gradient(
    kind: str, stored: str, how: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[int] = []
    original = lora_linear._LoraLinear.again
    monkeypatch.setattr(lora_linear._LoraLinear, "again", lambda ctx: (again.append(1), original(ctx))[1])
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    layers: list[Any] = [nn.Linear(10, 12, bias=stored != "no bias"), nn.Linear(12, 5)]
    if stored == "codes":
        layers = [QuantizedLinear.from_linear(layer, QuantConfig("nf4")) for layer in layers]
    found = []
    for inplace in (False, True):
        first, last = copy.deepcopy(layers)
        adapted = stirred(nn.Sequential(first, Negated(inplace), last), **KINDS[kind])
        with set_checkpoint_early_stop(how == "checkpointed"):
            out = adapted.module(x) if how == "kept" else checkpoint(adapted.module, x, use_reentrant=False)
            found.append([out.detach().clone(), *gradients(adapted, out, x)])
        # Kept, and computed again only where it is the output itself that is written over.
        overwritten = inplace and kind == "DoRA" and stored == "no bias"
        assert len(again) == overwritten
    for plain, own in zip(*found, strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(own, plain, rtol=1e-6, atol=1e-6)


def test_a_base_layer_alone_may_be_written_over() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, requires_grad=True)
    layer = QuantizedLinear.from_linear(nn.Linear(10, 12), QuantConfig("nf4"))
    (plain,) = torch.autograd.grad(torch.relu(layer(x) * -2).square().sum(), x)
    (own,) = torch.autograd.grad(layer(x).mul_(-2).relu_().square().sum(), x)
    assert torch.equal(own, plain)


def test_without_the_layers_input_a_scaled_output_that_was_written_over_is_refused() -> None:
    torch.manual_seed(0)
    adapted = stirred(nn.Sequential(nn.Linear(10, 12, bias=False)), use_dora=True, use_lora_fa=True)
    out = adapted.module(torch.randn(3, 10)).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place, and the layer's input was not kept"):
        out.sum().backward()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_output_of_a_fused_mlp_may_be_written_over_unless_it_is_kept(scaled: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, requires_grad=True)

    def linear(out: int, inner: int) -> LowRankLinear:
        A, B = torch.randn(4, inner, requires_grad=True), torch.randn(out, 4, requires_grad=True)
        scale = torch.rand(out, requires_grad=True) if scaled else None
        return LowRankLinear(torch.randn(out, inner), None, A, B, 0.5, scale)

    parts = linear(12, 10), linear(12, 10), linear(10, 12)
    (plain,) = torch.autograd.grad((gated_mlp(x, *parts) * -2).square().sum(), x)
    out = gated_mlp(x, *parts).mul_(-2)
    if scaled:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.square().sum().backward()
    else:
        assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], plain)


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = Llama4TextConfig(**size, **heads, num_local_experts=4, pad_token_id=0, attn_implementation="eager")
    model: nn.Module = Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.1) + ("norm" in name))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_llama_4_adds_its_experts_to_the_shared_one_in_place(kind: str) -> None:
    """The gradients are those of the sums that the model would make out of place."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextMLP

    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(3))
    found = []
    for copied in (True, False):
        adapted = stirred(llama4(), **KINDS[kind])
        shared = [m for m in adapted.module.modules() if isinstance(m, Llama4TextMLP)]
        assert len(shared) == 2
        for module in shared if copied else []:
            module.register_forward_hook(lambda module, inputs, out: out.clone())
        logits = adapted.module(ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        found.append([logits.detach(), *torch.autograd.grad(loss, adapted.parameters())])
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-7)
    assert sum(float(gradient.abs().max()) > 1e-5 for gradient in found[1][1:]) > len(found[1]) // 2
