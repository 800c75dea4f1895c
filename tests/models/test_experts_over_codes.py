"""Adapters on experts in codes: what they are over the decoded weights; the codes stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_folders import codes_of, decoded, some_ids, write_model
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge
from veneer.adapters.experts import LoraExperts
from veneer.models import Base, load_base
from veneer.quant.stack import QuantizedStack

MOE = ("Mixtral", "Qwen3Moe", "GptOss")
# float32 over the same decoded weights, summed in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), name, tiny_base) for name in MOE}


def load(folder: Path, **options: Any) -> Base:
    return load_base(folder, **{"dtype": "float32", "device": "cpu", "quantize": "nf4", **options})


def adapt(base: Base, **config: Any) -> AdaptedModel:
    adapted = attach(base, LoraConfig(**{"r": 4, "target_modules": [], "experts": "all", **config}), seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def logits(module: nn.Module) -> Tensor:
    result: Tensor = module(some_ids()).logits
    return result


@pytest.mark.parametrize("skip", [[], ["down_proj"]])
@pytest.mark.parametrize("name", MOE)
def test_outputs_and_gradients_are_those_over_the_decoded_weights(
    name: str, skip: list[str], folders: dict[str, Path]
) -> None:
    base = load(folders[name], skip=skip)
    before, codes = logits(base.module), {key: w.codes.clone() for key, w in codes_of(base).items()}
    found = []
    for one in (base, decoded(base, folders[name])):
        adapted = adapt(one)
        out = adapted.module(some_ids()).logits
        out.square().mean().backward()
        found.append((out, *(p.grad for p in adapted.parameters())))
        if one is base:
            with adapted.disabled():
                assert torch.equal(logits(base.module), before)
            adapted.detach()
            assert torch.equal(logits(base.module), before)
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert all(torch.equal(weight.codes, codes[key]) for key, weight in codes_of(base).items())


@pytest.mark.parametrize("name", MOE)
def test_merging_gives_plain_stacks_of_the_decoded_weights_with_the_update(name: str, folders: dict[str, Path]) -> None:
    base = load(folders[name])
    plain = adapt(decoded(base, folders[name]), experts=[0, 2])
    adapted = adapt(base, experts=[0, 2])
    merged = merge(adapted)
    assert not any(isinstance(part, QuantizedStack | LoraExperts) for part in merged.modules())
    expected = {key: value for key, value in merge(plain).state_dict().items() if "experts" in key}
    got = {key: value for key, value in merged.state_dict().items() if "experts" in key}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    torch.testing.assert_close(logits(merged), logits(adapted.module), **TOLERANCE)
    assert any(isinstance(part, QuantizedStack) for part in base.module.modules())  # the adapted one stays as it was


def test_an_adapter_trained_over_codes_is_saved_and_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    adapted = adapt(load(folders["GptOss"]), experts=[1, 3], target_modules="all-linear")
    adapted.save(tmp_path / "a")
    back = load_adapter(load(folders["GptOss"]), tmp_path / "a")
    assert torch.equal(logits(back.module), logits(adapted.module))


def test_the_table_counts_what_is_in_codes(folders: dict[str, Path]) -> None:
    base = load(folders["Mixtral"])
    plain = attach(decoded(base, folders["Mixtral"]), LoraConfig(r=4)).coverage
    coverage = adapt(base).coverage
    rows = {row.module: row for row in coverage.rows}
    assert (rows["experts.gate_up_proj"].matched, rows["experts.down_proj"].matched) == (2, 2)
    assert coverage.base_parameters == plain.base_parameters
