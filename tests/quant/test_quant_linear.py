"""The linear layer over codes: gradients, nothing kept, moves and casts, and a state dict like bitsandbytes'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from veneer.errors import ModelError
from veneer.quant import QuantConfig, QuantizedLinear, quantize, state_dict

SCHEMES = ["nf4", "fp4", "int4", "int8"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(
    scheme: str = "nf4", out: int = 33, width: int = 96, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(width, out, bias, dtype=dtype), QuantConfig(scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [96, 9])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_in_double_precision(scheme: str, width: int, training: bool) -> None:
    linear = layer(scheme, out=7, width=width, dtype=torch.float64).train(training)
    x = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_a_plain_linear_over_the_decoded_weight(scheme: str, dtype: torch.dtype, bias: bool) -> None:
    linear = layer(scheme, out=1500, width=576, bias=bias, dtype=dtype)
    x = torch.randn(3, 17, 576).to(dtype).requires_grad_()
    plain = x.detach().clone().requires_grad_()
    y, want = linear(x), F.linear(plain, linear.weight.dequantize(), linear.bias)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    want.backward(upstream)
    assert x.grad is not None
    assert plain.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # sums in another order
    assert (y - want).norm() < tolerance * want.norm()
    assert (x.grad - plain.grad).norm() < tolerance * plain.grad.norm()


def test_training_and_evaluation_compute_the_same_and_both_give_a_gradient() -> None:
    linear, x = layer(), torch.randn(4, 96, requires_grad=True)
    train, grad_train = (y := linear.train()(x)), torch.autograd.grad(y.sum(), x)[0]
    evaluated, grad_eval = (y := linear.eval()(x)), torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(train, evaluated)
    assert torch.equal(grad_train, grad_eval)
    assert grad_eval.abs().sum() > 0


def test_nothing_is_saved_for_the_backward() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer()(x)
    assert y.requires_grad
    assert saved == []


def test_checkpointing_gives_the_same_gradient() -> None:
    linear, x = layer(), torch.randn(4, 96, requires_grad=True)
    plain = torch.autograd.grad(linear(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(linear, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(plain, again)


def test_a_bias_that_is_trained_gets_its_gradient_and_a_plain_one_is_frozen() -> None:
    linear, x = layer(), torch.randn(4, 96)
    assert linear.bias is not None
    linear(x).sum().backward()
    assert linear.bias.grad is not None
    assert torch.equal(linear.bias.grad, torch.full((33,), 4.0))
    frozen = QuantizedLinear(linear.weight, torch.zeros(33))
    assert frozen.bias is not None
    assert not frozen.bias.requires_grad
    assert not frozen(x).requires_grad


def test_under_autocast_it_computes_in_its_dtype() -> None:
    linear, x = layer().requires_grad_(False), torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    want = F.linear(x.detach().bfloat16(), linear.weight.dequantize().bfloat16(), linear.bias.bfloat16())  # type: ignore[union-attr]  # has one
    assert torch.equal(y, want)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


CASTS: list[tuple[Callable[[nn.Module], Any], torch.dtype]] = [
    (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    (lambda m: m.half(), torch.float16),
    (lambda m: m.double(), torch.float64),
    (lambda m: m.type(torch.bfloat16), torch.bfloat16),
]


@pytest.mark.parametrize(("cast", "dtype"), CASTS)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_cast_changes_what_it_computes_in_and_no_stored_bit(
    scheme: str, cast: Callable[[nn.Module], Any], dtype: torch.dtype
) -> None:
    model = nn.Sequential(layer(scheme))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast(model)
    linear = model[0]
    assert isinstance(linear, QuantizedLinear)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert linear.bias is not None
    assert linear.weight.dtype == linear.bias.dtype == dtype
    assert linear(torch.randn(2, 96, dtype=dtype)).dtype == dtype


def test_a_move_takes_codes_and_scales_along() -> None:
    linear = layer().to("meta")
    assert {b.device.type for b in linear.buffers()} == {"meta"}
    assert linear.weight.device.type == "meta"
    assert len(list(linear.buffers())) == 4


def test_a_copy_is_independent() -> None:
    linear = layer()
    other = copy.deepcopy(linear)
    other.codes.zero_()
    assert linear.codes.count_nonzero() > 0
    assert other.weight.dequantize()[0, 0] != linear.weight.dequantize()[0, 0]


@pytest.mark.parametrize(("scheme", "double_quant"), [("nf4", True), ("fp4", False), ("int8", True)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_has_the_keys_of_bitsandbytes_and_no_others(scheme: str, double_quant: bool, bias: bool) -> None:
    modules = pytest.importorskip("bitsandbytes.nn", reason="the oracle is not installed")
    plain = nn.Linear(96, 33, bias)
    if scheme == "int8":
        theirs = modules.Linear8bitLt(96, 33, bias, has_fp16_weights=False)
        plain.half()
    else:
        theirs = modules.Linear4bit(96, 33, bias, quant_type=scheme, compress_statistics=double_quant)
    theirs.weight.data = plain.weight.data.clone()
    if bias:
        theirs.bias.data = plain.bias.data.clone()
    ours = QuantizedLinear.from_linear(plain, QuantConfig(scheme, double_quant=double_quant))
    found, want = ours.state_dict(), theirs.to("cpu").state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_saved_and_loaded_through_a_file(scheme: str, tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(layer(scheme, 48, 96), nn.LayerNorm(48), layer(scheme, 16, 48, bias=False))

    first, second, x = model(), model(), torch.randn(5, 96)
    assert not torch.equal(first(x), second(x))
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    found = second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(first(x), second(x))


def test_a_state_dict_without_the_weight_is_reported() -> None:
    linear = layer()
    assert linear.bias is not None
    found = linear.load_state_dict({"bias": linear.bias}, strict=False)
    assert found.missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"extra\""):
        linear.load_state_dict(linear.state_dict() | {"extra": torch.zeros(1)})


def test_a_weight_of_another_shape_or_in_16_bits_is_not_loaded() -> None:
    with pytest.raises(ModelError, match=r"the file's weight is \(33, 64\), the layer's \(33, 96\)"):
        layer().load_state_dict(state_dict(quantize(torch.randn(33, 64))), strict=False)
    with pytest.raises(ModelError, match="the weight is not quantised"):
        layer().load_state_dict(nn.Linear(96, 33).state_dict())


def test_nan_in_a_layer_is_refused_with_its_name() -> None:
    linear = nn.Linear(8, 8)
    linear.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match="NaN") as caught:
        QuantizedLinear.from_linear(linear, name="layers.0.q_proj.weight")
    assert caught.value.where == "layers.0.q_proj.weight"


def test_a_layer_shows_how_it_is_stored() -> None:
    shown = "QuantizedLinear(96, 33, bias=True, scheme=nf4, block_size=64, double_quant=True)"
    assert repr(layer()) == shown
    assert repr(layer("int8", bias=False)) == "QuantizedLinear(96, 33, bias=False, scheme=int8)"


def test_the_layer_as_a_plain_one_computes_the_same_and_shares_its_bias() -> None:
    linear, x = layer(dtype=torch.bfloat16).eval(), torch.randn(4, 96).bfloat16()
    plain = linear.dequantized()
    assert type(plain) is nn.Linear
    assert plain.bias is linear.bias
    assert not plain.weight.requires_grad
    assert not plain.training
    assert torch.equal(plain.weight, linear.weight.dequantize())
    assert (plain(x) - linear(x)).norm() < 4e-3 * plain(x).norm()


def test_the_weight_cannot_be_replaced_behind_the_buffers() -> None:
    with pytest.raises(AttributeError):
        layer().weight = torch.randn(33, 96)  # type: ignore[misc,assignment]  # what must fail


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_layer_is_in_the_mode_that_it_was_in(training: bool) -> None:
    """An adapter over it takes its mode, and with it whether it drops inputs."""
    assert QuantizedLinear.from_linear(nn.Linear(64, 4).train(training)).training is training
