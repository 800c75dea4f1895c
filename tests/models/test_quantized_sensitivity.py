"""Which layers stay in 16 bits: measured on their own inputs, the most error per byte first, within the allowance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_folders import decoded, some_ids, write_model

from veneer.errors import UsageError
from veneer.models import Base, load_base
from veneer.models.quantized_sensitivity import sensitive_layers
from veneer.quant import QuantConfig, quantize

ROWS = some_ids(3, 20).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "Llama", tiny_base)


def load(folder: Path, **options: Any) -> Base:
    return load_base(folder, **{"dtype": "float32", "device": "cpu", **options})


def test_the_error_is_that_of_the_layers_output_on_its_own_inputs(folder: Path) -> None:
    base = load(folder)
    table = {entry.path: entry for entry in sensitive_layers(base, ROWS, "nf4", share=0.1).table}
    assert len(table) == 14
    path = "model.layers.1.mlp.down_proj"
    layer, inputs = base.module.get_submodule(path), []
    hook = layer.register_forward_hook(lambda layer, given, output: inputs.append(given[0][0].detach()))
    for row in ROWS:
        base.module(torch.tensor([row]))
    hook.remove()
    x = torch.cat(inputs)
    delta = layer.weight - quantize(layer.weight).dequantize()
    expected = (x @ delta.T).square().sum() / (x @ layer.weight.T).square().sum()
    assert table[path].error == pytest.approx(float(expected), rel=1e-4)
    assert table[path].extra_bytes == pytest.approx(layer.weight.numel() * (4 - 4.127 / 8), rel=1e-3)


def test_the_most_error_per_byte_is_kept_first_and_all_of_it_fits_the_allowance(folder: Path) -> None:
    base = load(folder)
    one = sensitive_layers(base, ROWS, "nf4", allowance_bytes=40_000)
    gains = [entry.error / entry.extra_bytes for entry in one.table]
    assert gains == sorted(gains, reverse=True)
    left = 40_000
    for entry in one.table:  # down the table, whatever still fits
        assert (entry.path in one.keep) == (entry.extra_bytes <= left)
        left -= entry.extra_bytes if entry.path in one.keep else 0
    assert 2 <= len(one.keep) < 14
    assert sensitive_layers(base, ROWS, "nf4", allowance_bytes=0).keep == ()
    assert len(sensitive_layers(base, ROWS, "nf4", allowance_bytes=10**9).keep) == 14
    assert "layers keep 16 bits" in str(one)


def test_keeping_them_brings_the_model_nearer_to_the_original_than_keeping_others(folder: Path) -> None:
    base = load(folder)
    found = sensitive_layers(base, ROWS, "nf4", share=0.6)
    worst = [entry.path for entry in found.table[::-1]][: len(found.keep)]
    expected = base.module(some_ids()).logits
    errors = [
        float((load(folder, quantize="nf4", skip=skip).module(some_ids()).logits - expected).norm())
        for skip in (found.keep, worst, ())
    ]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def test_a_share_is_of_the_size_in_codes(folder: Path) -> None:
    base = load(folder)
    found = sensitive_layers(base, ROWS, QuantConfig("int8"), share=0.25)
    assert found.allowance_bytes == pytest.approx(0.25 * load(folder, quantize="int8").quantized.parameters, rel=1e-6)
    skipped = sensitive_layers(folder, ROWS, "nf4", share=0.25, skip=["mlp"])
    assert {entry.path.rpartition(".")[2] for entry in skipped.table} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_measuring_leaves_the_base_as_it_was(folder: Path) -> None:
    base = load(folder)
    before = base.module(some_ids()).logits
    sensitive_layers(base, ROWS, "nf4", share=0.1)
    assert torch.equal(base.module(some_ids()).logits, before)
    assert not any(module._forward_hooks for module in base.module.modules())


def test_transposed_linears_are_measured_too(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "GPT2", tiny_base)
    table = sensitive_layers(load(folder), ROWS, "nf4", share=0.1).table
    assert len(table) == 8
    assert all(0 < entry.error < 0.1 for entry in table)


def test_a_base_in_codes_and_a_call_without_rows_or_allowance_are_refused(folder: Path) -> None:
    base = load(folder, quantize="nf4")
    assert decoded(base, folder).quantized is None
    with pytest.raises(UsageError, match="in codes already"):
        sensitive_layers(base, ROWS, share=0.1)
    for arguments in ({}, {"share": 0.1, "allowance_bytes": 1}):
        with pytest.raises(UsageError, match="either allowance_bytes or share"):
            sensitive_layers(load(folder), ROWS, **arguments)
    with pytest.raises(UsageError, match="needs rows"):
        sensitive_layers(load(folder), [[]], share=0.1)
