"""A run over a base in codes: the recipe says so, and whoever takes the run folder gets the same codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.errors import UsageError
from veneer.models import Base, load_base
from veneer.quant import QuantConfig
from veneer.run import load_model, open_run
from veneer.train import train

TINY = {"num_train_epochs": 1, "max_steps": 2}


def base_of(run: Path, **options: Any) -> Base:
    model = load_model(run, device="cpu", **options)
    assert isinstance(model, AdaptedModel)
    assert isinstance(model.base, Base)
    return model.base


def same_weights(one: Base, other: Base) -> bool:
    mine, its = one.module.state_dict(), other.module.state_dict()
    mine, its = ({k.replace(".base_layer", ""): v for k, v in s.items() if ".adapters." not in k} for s in (mine, its))
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


def test_a_run_over_codes_is_loaded_over_the_same_codes(
    small_run: Callable[..., Any], tmp_path: Path, tiny_base: Path
) -> None:
    result, watcher = small_run(quantize="nf4", train=TINY)
    expected = load_base(tiny_base, dtype="float32", device="cpu", quantize="nf4")
    assert ("info", f"the base: {expected.quantized}") in watcher.messages
    assert watcher.loaded == (20, 20)
    assert open_run(result).recipe.quantize.scheme == "nf4"
    base = base_of(result.path)
    assert base.quantization == QuantConfig("nf4")
    assert same_weights(base, expected)
    plain = base_of(result.path, quantize="none")
    assert plain.quantization is None
    assert base_of(result.adapter).quantization == QuantConfig("nf4"), "the adapter alone knows it too"
    assert result.metrics["base_eval_loss"] != small_run("plain", train=TINY)[0].metrics["base_eval_loss"]


def test_the_section_of_keys_decides_the_codes(small_run: Callable[..., Any]) -> None:
    quantize = {"scheme": "fp4", "block_size": 32, "double_quant": False, "skip": ["down_proj", "layers.0"]}
    result, _ = small_run(quantize=quantize, train=TINY)
    base = base_of(result.path)
    assert base.quantization == QuantConfig("fp4", 32, False)
    assert base.quantized is not None
    assert (base.quantized.skip, base.quantized.tensors) == (("down_proj", "layers.0"), 6)


def test_layers_that_were_kept_by_measurement_are_kept_again(small_run: Callable[..., Any], tmp_path: Path) -> None:
    quantize = {"scheme": "nf4", "keep": 0.9, "skip": ["o_proj"]}
    result, watcher = small_run(quantize=quantize, train=TINY)
    recorded = open_run(result).recipe.quantize
    assert recorded.keep is None
    assert recorded.skip[0] == "o_proj"
    kept = recorded.skip[1:]
    assert 0 < len(kept) < 12
    assert any(text.startswith("measured on 20 training rows") for _, text in watcher.messages)
    base = base_of(result.path)
    assert base.quantized is not None
    assert base.quantized.skip == tuple(recorded.skip)
    plain = {path for path, part in base.module.named_modules() if type(part) is torch.nn.Linear}
    assert {path.removesuffix(".base_layer") for path in plain} >= set(kept)
    # Again, and gone on with: neither measures otherwise, and the latter does not measure at all.
    again, _ = small_run("again", quantize=quantize, train=TINY)
    assert open_run(again).recipe.quantize == recorded
    assert lines(again.path) == lines(result.path)
    _, resumed = small_run("again", resume=True, quantize=quantize, train={**TINY, "save_steps": 1})
    assert not any("measured on" in text for _, text in resumed.messages)


def test_resuming_over_another_storage_is_refused(small_run: Callable[..., Any]) -> None:
    small_run(quantize="nf4", train=TINY)
    with pytest.raises(Exception, match=r"quantize\.scheme: nf4 -> fp4"):
        small_run(resume=True, quantize="fp4", train=TINY)


def test_training_a_model_in_memory_records_its_storage(tiny_base: Path, tiny_rows: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, dtype="float32", device="cpu", quantize="nf4", skip=["down_proj"])
    model = attach(base, LoraConfig(r=2))
    result = train(model, tiny_rows, output_dir=tmp_path / "run", max_steps=1, max_length=64, samples=0)
    recorded = open_run(result).recipe.quantize
    assert (recorded.scheme, recorded.skip) == ("nf4", ["down_proj"])
    assert same_weights(base_of(result.path), base)


def test_a_skip_list_that_names_nothing_stops_the_run_before_it_is_written(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="'dwon_proj' matches no weight"):
        small_run(quantize={"scheme": "nf4", "skip": ["dwon_proj"]}, train=TINY)
    assert not (tmp_path / "run").exists()


def test_a_base_is_loaded_into_codes_where_load_model_is_told_so(tiny_base: Path) -> None:
    base = load_model(tiny_base, dtype="float32", device="cpu", quantize="int8")
    assert isinstance(base, Base)
    assert base.quantization == QuantConfig("int8")
