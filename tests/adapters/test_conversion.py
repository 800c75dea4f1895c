"""The error of a plain LoRA that was written for a start away from zero, against dense float64 sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kinds import stirred
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.adapters import LoraConfig, attach
from veneer.adapters.conversion import conversion_of

STARTS = ["pissa", "pissa_niter", "olora", "lora_ga", "pissa with dora"]


@pytest.mark.parametrize("name", STARTS)
def test_the_error_of_the_file_is_that_of_the_dense_updates(name: str, tmp_path: Path) -> None:
    adapted = stirred(name)
    folder = adapted.save(tmp_path / "a")
    exact = conversion_of(adapted, folder)
    assert exact is not None
    assert (exact.rank, exact.trained_rank) == (8, 4)
    assert exact.error < 1e-7
    file = folder / "adapter_model.safetensors"
    tensors = {key: tensor.bfloat16().float() for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    off, size = [], []
    for path, adapter in adapted.linears().items():
        A, B, A0, B0 = (t.detach().double() for t in (adapter.A, adapter.B, adapter.A0, adapter.B0))
        A1, B1 = (tensors[f"base_model.model.{path}.lora_{factor}.weight"].double() for factor in "AB")
        trained = adapter.scaling * (B @ A - B0 @ A0)
        off.append((adapter.scaling * B1 @ A1 - trained).square().sum())
        size.append(trained.square().sum())
    expected = float((sum(off) / sum(size)) ** 0.5)
    assert expected > 1e-4
    found = conversion_of(adapted, folder)
    assert found is not None
    assert found.error == pytest.approx(expected, rel=1e-6)
    assert f"rank 8 (trained with 4) for the untouched base, its update {expected:.1e}" in str(found)


def test_with_a_frozen_a_the_rank_stays(tmp_path: Path) -> None:
    adapted = attach(
        nn.Sequential(nn.Linear(9, 7)), LoraConfig(r=3, init_lora_weights="pissa", use_lora_fa=True), seed=0
    )
    folder = adapted.save(tmp_path / "fresh")
    fresh = conversion_of(adapted, folder)
    assert fresh is not None
    assert (fresh.rank, fresh.error) == (3, 0.0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1)
    stale = conversion_of(adapted, folder)
    assert stale is not None
    assert stale.error == pytest.approx(1.0)


def test_where_the_file_holds_what_is_trained_there_is_nothing_to_say(tmp_path: Path) -> None:
    for name in ("lora", "eva", "adalora"):
        adapted = stirred(name)
        assert conversion_of(adapted, adapted.save(tmp_path / name)) is None
