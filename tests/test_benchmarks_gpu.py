"""The script for a GPU: that all of it runs (toy shapes, on the CPU), and that it tells what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu_checks import SIZES, checks
from torch import Tensor

from veneer.kernels import rms_norm


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()


def test_all_of_it_runs_in_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    run(monkeypatch, "--dry", "--json", str(tmp_path / "gpu.json"), "--write", str(tmp_path / "gpu.md"))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["train"]) == 8
    for part in ("train", "peers", "decode"):
        assert all("error" not in row and row["tokens_per_second"] > 0 for row in report[part]), report[part]
    assert all(row["right"] for row in report["checks"])
    told = (tmp_path / "gpu.md").read_text()
    assert told.strip() in capsys.readouterr().out
    assert "| 70B, NF4, 2,048 tokens, every layer twice |" in told
    assert "Every operation is within its limit of float64." in told


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = rms_norm.normalised

    def off(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y, rstd = forward(x, weight, eps, offset)
        return y * 1.1, rstd

    monkeypatch.setattr(rms_norm, "normalised", off)
    wrong = {row["operation"] for row in checks("cpu", SIZES[:1]) if not row["right"]}
    assert "RMSNorm" in wrong
    assert wrong <= {"RMSNorm", "sum and RMSNorm with an offset"}  # which may be made of it


def test_a_case_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(card: gpu.Card, case: gpu.Case, flops: float) -> gpu.Row:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(gpu, "train", broken)
    report = gpu.measure(gpu.Card(dry=True), ["train", "decode"], dry=True)
    assert report["train"][0] == {"case": "8B, bf16", "error": "OutOfMemoryError: no memory"}
    assert [row["rows"] for row in report["decode"]] == [1, 32]
    assert "| 8B, bf16 | OutOfMemoryError: no memory | | |" in gpu.markdown(report)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU here"):
        run(monkeypatch)
