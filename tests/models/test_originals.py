"""What a base's codes were made from, read once more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_folders import write_model
from torch import Tensor

from veneer.adapters import LoraConfig, attach
from veneer.errors import ModelError
from veneer.models import load_base, save_base
from veneer.quant import QuantizedLinear


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Phi3", "Mixtral"])
def test_each_original_is_the_weight_of_the_plain_model(family: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", family, tiny_base)
    plain = load_base(folder, device="cpu").module
    base = load_base(folder, device="cpu", quantize="nf4")
    paths = [path for path, module in base.module.named_modules() if isinstance(module, QuantizedLinear)]
    seen: dict[str, Tensor] = {}
    base.each_original(paths, lambda path, weight: seen.update({path: weight.clone()}))
    assert seen.keys() == set(paths)
    for path, weight in seen.items():
        own = plain.get_submodule(path).weight
        assert torch.equal(weight.to(own.dtype), own.t() if family == "GPT2" else own)


def test_adapters_on_the_base_change_nothing(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu", quantize="nf4")
    adapted = attach(base, LoraConfig(r=4, lora_alpha=16, init_lora_weights="loftq"), seed=0)
    assert "off the original weights" in adapted.notes["default"]
    path = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    base.each_original([path], lambda path, weight: seen.append(weight))
    layer = adapted.module.get_submodule(path)
    lost = seen[0].float() - layer.rows()  # type: ignore[operator]
    assert (lost - adapted.linears()[path].delta()).norm() < 0.95 * lost.norm()


def test_a_folder_of_codes_alone_has_no_originals(tiny_base: Path, tmp_path: Path) -> None:
    save_base(load_base(tiny_base, device="cpu", quantize="nf4"), tmp_path / "codes")
    base = load_base(tmp_path / "codes", device="cpu")
    with pytest.raises(ModelError, match="the codes alone, and not the weights"):
        attach(base, LoraConfig(r=4, init_lora_weights="loftq"))
