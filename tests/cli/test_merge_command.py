"""``veneer merge`` of a run over a quantised base: what is printed, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.adapters import LoraConfig, attach
from veneer.models import load_base

Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def coded_adapter(make_tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over a tiny base in NF4. Read only: it is shared."""
    base = load_base(make_tiny_base(hidden_size=64), dtype="float32", device="cpu", quantize="nf4")
    adapted = attach(base, LoraConfig(r=4, lora_alpha=4, init_lora_weights=False), seed=0)
    return adapted.save(tmp_path_factory.mktemp("coded") / "adapter")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").strip().strip("│").split("│")]


def test_both_ways_are_printed_beside_the_unmerged_run(cli: Cli, coded_adapter: Path, tmp_path: Path) -> None:
    done = cli("merge", coded_adapter, "--output", tmp_path / "m", "--dtype", "float32")
    assert done.code == 0, done.err
    table = {row[0]: row[1:] for row in map(cells, done.out.splitlines()) if len(row) == 5}
    assert table[""] == ["mean KL (nats)", "same first choice", "largest logit difference", "perplexity"]
    assert table["unmerged"][:3] == ["", "", ""]
    near, far = table["onto dequantized (written)"], table["onto original"]
    assert float(near[0]) < 1e-9 < 1e-5 < float(far[0])
    assert near[1] == "100.00 %"
    assert near[3] == table["unmerged"][3] != far[3]
    assert "weights in nf4 (blocks of 64, with double quantisation)" in done.out
    assert "written in float32: onto the dequantized weights" in done.out
    assert "measured on 6 built-in texts, " in done.out
    assert "veneer chat" in done.out
    # Nothing that sounds like a warning: the other precision is what was asked for.
    assert "trained over" not in done.err

    other = cli("merge", coded_adapter, "--output", tmp_path / "d", "--dtype", "float32", "--onto", "original")
    assert "onto original (written)" in other.out
    assert "onto the original weights" in other.out


def test_json_has_both_drifts(cli: Cli, coded_adapter: Path, tmp_path: Path) -> None:
    done = cli("merge", coded_adapter, "--output", tmp_path / "m", "--dtype", "float32", "--json")
    merged = json.loads(done.out)
    assert merged["onto"] == "dequantized"
    assert merged["drift"] == merged["drifts"]["dequantized"]
    assert merged["drift"]["mean_kl"] < merged["drifts"]["original"]["mean_kl"]
    assert json.loads((tmp_path / "m" / "veneer.json").read_text())["merged"]["drifts"] == merged["drifts"]


def test_a_run_over_plain_weights_prints_its_drift_with_the_perplexity_of_its_held_out_rows(
    cli: Cli, run_folder: Path, tmp_path: Path
) -> None:
    done = cli("merge", run_folder, "--output", tmp_path / "m")
    assert done.code == 0
    assert "merged in float32: over " in done.out
    assert "the perplexity " in done.out
    assert "measured on the answers of the run's 5 held-out rows, " in done.out
    assert "onto" not in done.out


def test_a_recipe_with_nf4_is_trained_merged_and_asked(
    cli: Cli, tiny_base: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"base: {tiny_base}\nquantize: nf4\ndtype: float32\ndata: {{train: {tiny_rows}, eval: 5}}\nadapter: {{r: 4}}\n"
        "train: {max_steps: 3, max_length: 64, learning_rate: 1e-2}\neval: {samples: 0}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    assert cli("train", recipe, "--quiet").code == 0
    done = cli("merge", tmp_path / "run", "--output", tmp_path / "m", "--onto", "dequantized")
    assert done.code == 0, done.err
    assert "measured on the answers of the run's 5 held-out rows, " in done.out
    asked = ("spell 1", "--max-new-tokens", 5)
    assert cli("generate", tmp_path / "m", *asked).out == cli("generate", tmp_path / "run", *asked).out


def test_a_way_that_there_is_not_is_wrong_usage(
    cli: Cli, run_folder: Path, coded_adapter: Path, tmp_path: Path
) -> None:
    refused = cli("merge", run_folder, "--output", tmp_path / "m", "--onto", "dequantized")
    assert refused.code == 2
    assert "over weights that are not quantised: there are no codes to dequantise" in refused.err
    assert "leave --onto out" in refused.err
    slip = cli("merge", coded_adapter, "--output", tmp_path / "m", "--onto", "orginal")
    assert slip.code == 2
    assert "'original'" in slip.err
    assert not (tmp_path / "m").exists()


def test_an_adapter_of_another_program_is_told_what_it_was_trained_over(
    cli: Cli, coded_adapter: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (theirs / name).write_bytes((coded_adapter / name).read_bytes())
    unknown = cli("merge", theirs, "--output", tmp_path / "a", "--dtype", "float32", "--json")
    assert json.loads(unknown.out)["drifts"].keys() == {"original"}
    told = cli("merge", theirs, "--output", tmp_path / "b", "--dtype", "float32", "--quantize", "nf4", "--json")
    ours = cli("merge", coded_adapter, "--output", tmp_path / "c", "--dtype", "float32", "--json")
    assert json.loads(told.out)["drifts"] == json.loads(ours.out)["drifts"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB: the merged model does not fit."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_a_disk_that_is_full_leaves_no_half_folder(cli: Cli, coded_adapter: Path, small_disk: Path, onto: str) -> None:
    done = cli("merge", coded_adapter, "--output", small_disk / "m", "--dtype", "float32", "--onto", onto)
    assert done.code == 1
    assert "the disk is full" in done.err
    assert "Traceback" not in done.said
    assert list(small_disk.iterdir()) == []
