"""LoftQ: the start at what the codes lost, the scaling taken into account; one round over the base's codes, or more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.adapters import LoraConfig, LoraLinear, attach, load_adapter, merge
from veneer.adapters.init_loftq import loftq
from veneer.adapters.save import read_record
from veneer.errors import AdapterError
from veneer.quant import QuantConfig, QuantizedLinear, quantize

NF4 = QuantConfig("nf4")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 96)
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))  # type: ignore[no-any-return]


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def coded_net(config: QuantConfig = NF4) -> nn.Module:
    net = plain_net()
    for name in ("up_proj", "down_proj"):
        setattr(net, name, QuantizedLinear.from_linear(getattr(net, name), config, name))
    return net


def originals(paths: Collection[str], visit: Callable[[str, Tensor], None]) -> None:
    net = plain_net()
    for path in paths:
        visit(path, net.get_submodule(path).weight)  # type: ignore[arg-type]


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 24, "init_lora_weights": "loftq", **settings})


def train(module: nn.Module, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, y = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 8}, {"use_rslora": True}, {"lora_alpha": 3}], ids=str)
@pytest.mark.parametrize("stored", [NF4, QuantConfig("fp4", double_quant=False), QuantConfig("int8")], ids=str)
def test_invariant_7_the_start_is_the_best_of_its_rank_whatever_the_scaling(
    settings: dict[str, Any], stored: QuantConfig
) -> None:
    """PEFT leaves the scaling out (its issue 1982): with ``alpha != r`` its start makes the error larger."""
    adapted = attach(coded_net(stored), config(**settings), seed=0, originals=originals)
    for path, adapter in adapted.linears().items():
        layer = adapted.module.get_submodule(path)
        assert isinstance(layer, LoraLinear)
        lost = plain_net().get_submodule(path).weight - layer.rows()  # type: ignore[operator]
        singular = torch.linalg.svdvals(lost)
        left = (lost - adapter.delta()).norm()
        assert left == pytest.approx(float(singular[8:].norm()), rel=1e-4)
        assert left < lost.norm()


def test_more_rounds_never_have_a_larger_error() -> None:
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    codes = quantize(W, NF4)
    for scaling in (0.5, 3.0):
        starts = [loftq(W, codes, 8, scaling, rounds) for rounds in (1, 2, 3, 5, 8)]
        errors = [start.after for start in starts]
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < 0.97 * errors[0] < 0.97 * starts[0].before
        best = starts[-1]
        left = W - best.codes.dequantize() - (scaling * best.B @ best.A)
        assert float(left.square().sum()) == pytest.approx(best.after, rel=1e-4)


def test_one_round_leaves_a_plain_lora_over_the_base_as_it_is(tmp_path: Path) -> None:
    net = coded_net()
    x = torch.randn(3, 64)
    before = net(x)
    adapted = attach(net, config(), seed=0, originals=originals)
    assert (net(x) - plain_net()(x)).norm() < (before - plain_net()(x)).norm()
    train(net, adapted.parameters())
    folder = adapted.save(tmp_path / "adapter")
    loaded = load_adapter(coded_net(), folder)
    assert loaded.configs["default"].r == 8
    assert torch.equal(loaded.module(x), net(x))
    with adapted.disabled():
        assert torch.equal(net(x), before)


def test_dora_starts_from_the_norms_of_what_loftq_gives() -> None:
    net = coded_net()
    plain = attach(coded_net(), config(), seed=0, originals=originals)
    attach(net, config(use_dora=True), seed=0, originals=originals)
    x = torch.randn(3, 64)
    assert torch.allclose(net(x), plain.module(x), atol=1e-5)


def test_more_rounds_bring_codes_of_their_own_and_leave_those_of_the_base(tmp_path: Path) -> None:
    net = coded_net()
    x = torch.randn(3, 64)
    before = net(x)
    adapted = attach(net, config(loftq_config={"loftq_iter": 5}), seed=0, originals=originals)
    assert "codes of its own" in adapted.notes["default"]
    assert "rank 16" in adapted.notes["default"]
    train(net, adapted.parameters())
    after = net(x)
    own = adapted.linears()["up_proj"].own
    assert own is not None
    assert not torch.equal(own.codes, net.up_proj.base_layer.codes)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(merge(adapted)(x), after, atol=1e-5)
    with adapted.disabled():
        assert torch.equal(net(x), before)
    # What it trained is exact on the weights in 16 bits, up to what the start left of W - Q - s B A.
    folder = adapted.save(tmp_path / "adapter")
    assert read_record(folder)["quantization"] is None
    loaded = load_adapter(plain_net(), folder)
    assert loaded.configs["default"].r == 16
    start = attach(coded_net(), config(loftq_config={"loftq_iter": 5}), seed=0, originals=originals)
    for path, adapter in loaded.linears().items():
        first, last = (model.linears()[path] for model in (start, adapted))
        assert last.own is not None
        off = plain_net().get_submodule(path).weight - last.own.weight.dequantize() - first.delta()  # type: ignore[operator]
        expected = last.own.weight.dequantize() + last.delta() + off
        got = plain_net().get_submodule(path).weight + adapter.delta()  # type: ignore[operator]
        assert torch.allclose(got, expected, atol=1e-5)
    assert (loaded.module(x) - after).norm() < (before - plain_net()(x)).norm()
    assert torch.equal(adapted.detach()(x), before)


def test_the_training_state_brings_the_own_codes_back(tmp_path: Path) -> None:
    from veneer.adapters.save import read_training_state

    several = config(loftq_config={"loftq_iter": 3})
    adapted = attach(coded_net(), several, seed=0, originals=originals)
    train(adapted.module, adapted.parameters())
    folder = adapted.save(tmp_path / "adapter", training_state=True)

    def others(paths: Collection[str], visit: Callable[[str, Tensor], None]) -> None:
        for path in paths:
            visit(path, torch.randn_like(plain_net().get_submodule(path).weight))  # type: ignore[arg-type]

    resumed = attach(coded_net(), several, seed=1, originals=others)
    untouched = resumed.module.get_submodule("up_proj").base_layer.codes.clone()  # type: ignore[union-attr, operator]
    x = torch.randn(3, 64)
    assert not torch.equal(resumed.module(x), adapted.module(x))
    resumed.load_state(read_training_state(folder))
    assert torch.equal(resumed.module(x), adapted.module(x))
    assert torch.equal(resumed.module.get_submodule("up_proj").base_layer.codes, untouched)  # type: ignore[union-attr, arg-type]


def test_what_is_not_in_codes_has_lost_nothing_and_starts_by_default() -> None:
    net = coded_net()
    net.down_proj = plain_net().down_proj
    adapted = attach(net, config(), seed=0, originals=originals)
    assert not adapted.linears()["down_proj"].B.any()
    assert adapted.linears()["up_proj"].B.any()


@pytest.mark.parametrize(
    ("net", "settings", "with_originals", "message"),
    [
        (plain_net, {}, True, "no weight of the adapter is quantised"),
        (coded_net, {"loftq_config": {"loftq_bits": 8}}, True, "loftq_bits is 8, and the base is in codes of 4 bits"),
        (coded_net, {}, False, "the weights that they were made from, and these are not known here"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(
    net: Callable[[], nn.Module], settings: dict[str, Any], with_originals: bool, message: str
) -> None:
    module = net()
    with pytest.raises(AdapterError, match=message):
        attach(module, config(**settings), originals=originals if with_originals else None)
    assert not any(isinstance(layer, LoraLinear) for layer in module.modules())


def test_dora_over_codes_of_its_own_is_refused() -> None:
    with pytest.raises(AdapterError, match="use_dora and loftq_iter: 2 do not go together"):
        config(use_dora=True, loftq_config={"loftq_iter": 2})


def test_two_adapters_with_codes_of_their_own_do_not_act_together() -> None:
    adapted = attach(coded_net(), config(loftq_config={"loftq_iter": 2}), seed=0, originals=originals)
    adapted.add(config(loftq_config={"loftq_iter": 2}), "second", seed=1, originals=originals)
    with pytest.raises(AdapterError, match="both replace this module"):
        adapted.use("default", "second")
