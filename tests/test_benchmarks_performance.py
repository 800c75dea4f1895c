"""The page of speed and memory, from records that were made up; the measuring itself is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.performance import LENGTHS, RATIO_TOKENS, File, make_rows, points
from benchmarks.performance_page import write_page

ROOT = Path(__file__).parents[1]


def result(speed: float, memory: float, **more: Any) -> dict[str, Any]:
    figures = {"trained_tokens_per_second": speed / 2, "share_of_peak": 0.4, "first_step_seconds": 9.0}
    return {"tokens_per_second": speed, "peak_rss_gb": memory, **figures, "losses": [2.0, 1.5, 1.0], **more}


def peers(quantize: str, speed: float) -> dict[str, Any]:
    settings = {"base": "b", "dtype": "bfloat16", "batch": 8, "steps": 3, "data": "d", "tokens": 900, "runs": 3}
    settings["computed_tokens"] = 800
    theirs = {"speed_ratio": speed, "memory_ratio": 0.25, "curve": {"agrees": True, "relative": 0.001}}
    return {
        "name": f"peers {quantize}",
        "part": "peers",
        "settings": {**settings, "quantize": quantize},
        "warm_up_steps": 2,
        "peak_flops": 4.7e11,
        "results": {"veneer": result(600.0, 1.5), "trl": result(70.0, 6.0, **theirs)},
        "ratios": {"trl": {"speed": speed, "memory": 0.25}},
    }


def records() -> dict[str, Any]:
    machine = {"processor": "x86_64", "features": ["avx2"], "threads": 2, "memory_gb": 24.0, "torch": "2"}
    entry = {"rows": 1, "adapter": True, "veneer": 50.0, "transformers": 30.0, "ratio": 1.7, "same": 0.4}
    ratio = {"step_ratio": 1.2, "step_low": 1.1, "step_high": 1.3, "memory_ratio": 1.0, "limit": 1.15}
    point = {"axis": "length", "tokens": 4096.0, "trained": 1.0, "tokens_per_second": 500.0, "peak_rss_gb": 2.0}
    point["commit"] = "abc1234"
    generation = {"settings": {"tokens": 64}, "target": 2.0, "results": [{**entry, "memory_ratio": 0.9}]}
    return {
        "machine": {"name": "machine", "part": "machine", **machine},
        "a": peers("none", 7.5),
        "b": peers("nf4", 9.0),
        "c": {"name": "generation", "part": "generation", **generation},
        "d": {"name": "DoRA to LoRA", "part": "ratios", **ratio},
        "e": {"name": "length: 256", "part": "growth", "value": 256, **point},
        "f": {"name": "length: 512", "part": "growth", "value": 512, **point},
    }


def test_the_page_has_every_part_its_verdicts_and_pictures(tmp_path: Path) -> None:
    write_page(records(), tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    for part in (
        "at least 8 times the speed: **missed** (7.50); at most 0.3 times the memory: reached (0.25)",
        "0.47",
        "| 1 | yes | 50 | 30 | 1.70 x (missed) |",
        "| DoRA to LoRA | 1.200 (1.100 to 1.300) | 1.000 | 1.15: **missed** |",
        "| length: 512 | 4096 | 100% | 500 | 2.00 |",
        "within 0.10%",
        "at commit abc1234",
        "of which Veneer computes 800",
        "- training against LitGPT's `finetune lora`, quantize none",
    ):
        assert part in text
    for name in ("curves-none", "curves-nf4", "growth"):
        assert f"(performance-{name}.png)" in text
        assert (tmp_path / f"performance-{name}.png").stat().st_size > 5000


def test_a_row_that_learned_something_else_is_void(tmp_path: Path) -> None:
    found = records()
    found["a"]["ratios"]["trl"]["void"] = True
    write_page(found, tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    assert "TRL's SFTTrainer, its defaults: void" in text
    assert "at least 8 times" not in text


def test_what_the_file_holds_is_not_measured_again_and_a_failure_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = File(tmp_path / "results.jsonl")

    def failing() -> dict[str, Any]:
        raise SystemExit("first line\nno room")

    file.measure("one", "growth", lambda: {"x": 1})
    file.measure("two", "growth", failing)
    assert "failed: no room" in capsys.readouterr().out
    again = File(tmp_path / "results.jsonl")
    again.measure("one", "growth", failing)
    assert list(again.records) == ["one"]
    assert "failed" not in capsys.readouterr().out
    again.measure("two", "growth", lambda: {"x": 2})
    assert [json.loads(line)["x"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [1, 2]


def test_steps_of_every_length_have_the_same_tokens() -> None:
    found = [job for axis, _, job in points({}) if axis == "length"]
    assert [job["max_length"] for job in found] == list(LENGTHS)
    assert {job["max_length"] * job["batch"] for job in found} == {RATIO_TOKENS}


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_rows_have_the_length_and_the_share_that_is_asked_for(tiny_base: Path, tmp_path: Path, share: float) -> None:
    job = {"base": str(tiny_base), "rows": str(tmp_path / "rows.jsonl"), "max_length": 120, "steps": 3, "batch": 2}
    made = make_rows({**job, "trained": share})
    assert made["tokens"] == pytest.approx(240, rel=0.25)
    assert made["trained"] == pytest.approx(share, abs=0.15)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6


def test_an_unknown_part_is_refused_before_anything_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.performance", "--results", str(tmp_path / "r"), "--only", "spead"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "unknown part 'spead'" in done.stderr
