"""Adapters over a base in codes: what they compute is what they compute over the numbers that the codes stand for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge
from veneer.quant import QuantConfig, QuantizedLinear

CONFIGS = [
    QuantConfig("nf4"),
    QuantConfig("nf4", block_size=128, double_quant=False),
    QuantConfig("fp4"),
    QuantConfig("int8"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down_proj = nn.Linear(96, 64, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.norm(torch.tanh(self.up_proj(x)))) + x  # type: ignore[no-any-return]


def in_codes(config: QuantConfig, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same net over codes, and over the numbers that they stand for."""
    torch.manual_seed(0)
    coded = Net().to(dtype)
    for name in ("up_proj", "down_proj"):
        setattr(coded, name, QuantizedLinear.from_linear(getattr(coded, name), config, name))
    plain = copy.deepcopy(coded)
    for name in ("up_proj", "down_proj"):
        setattr(plain, name, getattr(plain, name).dequantized())
    return coded, plain


def losses(model: AdaptedModel, dtype: torch.dtype, steps: int = 5) -> list[float]:
    torch.manual_seed(1)
    x, y = torch.randn(steps, 8, 64, dtype=dtype), torch.randn(steps, 8, 64, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for row, target in zip(x, y):
        loss = (model.module(row) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.block_size}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_over_codes_is_training_over_the_decoded_weights(
    config: QuantConfig, dtype: torch.dtype, dropout: float
) -> None:
    series = []
    for net in in_codes(config, dtype):
        model = attach(net, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), seed=0)
        series.append(losses(model, dtype))
    assert series[0] == pytest.approx(series[1], rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert series[0][-1] < series[0][0]


def test_with_the_adapter_off_the_base_in_codes_is_itself_bit_for_bit() -> None:
    net, _ = in_codes(CONFIGS[0])
    x = torch.randn(3, 64)
    before = net(x)
    model = attach(net, LoraConfig(r=4), seed=0)
    losses(model, torch.float32)
    with model.disabled():
        assert torch.equal(net(x), before)
    assert not torch.equal(net(x), before)
    assert torch.equal(model.detach()(x), before)


def test_the_coverage_counts_the_parameters_that_lie_in_codes() -> None:
    net, plain = in_codes(CONFIGS[0])
    coded, decoded = attach(net, LoraConfig(r=4)).coverage, attach(plain, LoraConfig(r=4)).coverage
    assert coded.base_parameters == decoded.base_parameters
    assert "QuantizedLinear" in str(coded)


def test_an_adapter_over_codes_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    net, plain = in_codes(CONFIGS[0])
    model = attach(net, LoraConfig(r=4), seed=0)
    losses(model, torch.float32)
    folder = model.save(tmp_path / "adapter")
    x = torch.randn(3, 64)
    expected = net(x)
    other = load_adapter(in_codes(CONFIGS[0])[0], folder)
    assert torch.equal(other.module(x), expected)
    assert torch.allclose(load_adapter(plain, folder).module(x), expected, atol=1e-5)


def test_merging_over_codes_gives_plain_linears_that_answer_as_the_adapter_did() -> None:
    net, _ = in_codes(CONFIGS[0])
    model = attach(net, LoraConfig(r=4, target_modules=["up_proj"]), seed=0)
    losses(model, torch.float32)
    x = torch.randn(3, 64)
    merged = merge(model)
    assert not any(isinstance(layer, QuantizedLinear) for layer in merged.modules())
    assert type(merged.down_proj) is nn.Linear
    assert torch.allclose(merged(x), net(x), atol=1e-5)
    assert isinstance(model.detach().up_proj, QuantizedLinear)
