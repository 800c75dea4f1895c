"""What the benchmark concludes from its measurements; the measuring itself is no test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.sft import compare_all, compare_curves, first_rows, middle, table, verdict

from veneer.cli.bench import BENCHMARKS

ROOT = Path(__file__).parents[1]
RATES = [1e-3, 5e-4, 0.0]


def curve(losses: list[float], rates: list[float] = RATES) -> dict[str, object]:
    return {"losses": losses, "learning_rates": rates}


def test_curves_that_differ_by_rounding_agree() -> None:
    found = compare_curves(curve([3.0, 2.0, 1.0]), curve([3.01, 2.01, 0.99]))
    assert found["agrees"]
    assert found["same_learning_rates"]
    assert found["first_difference"] == pytest.approx(0.01)
    assert found["mean_difference"] == pytest.approx(0.01)


@pytest.mark.parametrize("losses", [[3.0, 2.2, 1.2], [3.0, 2.0, 1.3], [3.0, 3.0, 3.0]])
def test_curves_that_differ_by_more_do_not(losses: list[float]) -> None:
    assert not compare_curves(curve([3.0, 2.0, 1.0]), curve(losses))["agrees"]


def test_another_learning_rate_in_one_step_is_seen() -> None:
    found = compare_curves(curve([3.0, 2.0, 1.0]), curve([3.0, 2.0, 1.0], [1e-3, 6e-4, 0.0]))
    assert not found["same_learning_rates"]


def test_curves_that_bfloat16_drives_apart_are_held_against_float32() -> None:
    ours, theirs = curve([3.0, 2.0, 1.0]), curve([3.0, 2.2, 1.1])
    jobs: list[dict[str, object]] = []

    def judged(losses: list[float], dtype: str = "bfloat16") -> str:
        def train(job: dict[str, object]) -> dict[str, object]:
            jobs.append(job)
            return curve(losses)

        return verdict(compare_all({"dtype": dtype, "batch": 8}, ours, {"trl": theirs}, train)["trl"])

    assert judged([3.0, 2.01, 1.0]).startswith("apart by the rounding of bfloat16: from float32's curve ours is 0.33%")
    assert jobs == [{"dtype": "float32", "batch": 8, "run": "float32"}]
    assert judged([3.0, 2.19, 1.1]).startswith("DIFFERENT: ")  # ours is the one that is off
    assert judged([3.0, 2.5, 1.5]).startswith("DIFFERENT: ")  # neither is near
    assert judged([3.0, 2.0, 1.0], "float32") == "DIFFERENT"  # no rounding explains it
    assert len(jobs) == 3


def test_the_table_has_ratios_both_curves_and_the_verdict() -> None:
    common = {"trained_tokens_per_second": 1.0, "share_of_peak": 0.5, "first_step_seconds": 3.0}
    ours = {"tokens_per_second": 600.0, "peak_rss_gb": 1.0, "train_seconds": 10.0, **common, **curve([3.0, 2.0, 1.0])}
    theirs = {"tokens_per_second": 150.0, "peak_rss_gb": 4.0, "train_seconds": 40.0, **common, **curve([3.0, 2.5, 1.0])}
    theirs |= {"speed_ratio": 4.0, "memory_ratio": 0.25, "curve": compare_curves(ours, theirs)}
    told = {"base": "b", "dtype": "float32", "threads": 2, "batch": 8, "steps": 3, "data": "d", "tokens": 1}
    told |= {"quantize": "none", "runs": 1, "computed_tokens": 1}
    text = table({"settings": told, "warm_up_steps": 2, "results": {"veneer": ours, "trl": theirs}})
    for part in ("4.00 x as fast", "0.25 x the memory", "2.0000     2.5000", "DIFFERENT", "VOID", "from step 3 on"):
        assert part in text


def test_figures_of_several_runs_are_medians_and_the_curve_is_the_first_ones() -> None:
    keys = ("tokens_per_second", "peak_rss_gb", "train_seconds", "first_step_seconds")
    runs = [{**dict.fromkeys(keys, value), "losses": [value]} for value in (5.0, 1.0, 2.0)]
    assert middle(runs) == {**dict.fromkeys(keys, 2.0), "losses": [5.0]}


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(SystemExit, match="only 3 rows"):
        first_rows(source, 8, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "axolotl"], "unknown peer"),
        (["--peers", "litgpt"], "litgpt is not installed for"),
        (["--steps", "2"], "must be more than 2"),
        (["--rows", "10"], "multiple of --batch"),
        (["--python", "trl=python"], "'trl' is none of litgpt, llamafactory"),
        (["--python", "litgpt=/nowhere/python"], "there is no program '/nowhere/python'"),
        (["--peers", "litgpt", "--quantize", "nf4"], "litgpt takes part in 16 bits alone"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.sft", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("arguments", [["--peers", "axolotl"], ["sft", "--peers", "axolotl"]])
def test_the_command_line_takes_options_with_and_without_a_name(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "veneer", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unknown peer 'axolotl'" in done.stderr


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_of_the_command_line_is_there(name: str) -> None:
    assert (ROOT / "benchmarks" / f"{name}.py").is_file()
