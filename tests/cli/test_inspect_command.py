"""``veneer inspect`` and ``veneer resize``: what is printed, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.adapters import read_adapter

Cli = Callable[..., Any]


@pytest.fixture
def own_run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the shared run, for what writes into it."""
    return shutil.copytree(run_folder, tmp_path / "run")


def test_inspect_prints_kinds_depth_and_advice_and_draws_a_picture(cli: Cli, own_run: Path) -> None:
    done = cli("inspect", own_run)
    assert done.code == 0, done.err
    heading = next(line for line in done.out.splitlines() if "effective" in line)
    names = ("module", "layers", "rank", "effective", "90 %", "99 %", "norm", "share %", "% of base", "new")
    assert all(name in heading for name in names)
    rows = [line.split()[0] for line in done.out.splitlines() if line.strip().split()[:1] and "_proj" in line]
    assert sorted(rows) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert "depth: layer 0 " in done.out
    assert "of 4 ranks" in done.out
    assert "leading directions of the adapted weights" in done.out
    assert (own_run / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert "inspect.png" in done.out


def test_the_depth_says_where_the_change_is_and_sizes_are_written_out() -> None:
    from veneer.cli.inspect import _depth_line, _percent
    from veneer.ship import Inspection, LayerReport

    def layers(*depths: int | None) -> list[LayerReport]:
        return [LayerReport("a", "a", d, 1, 1.0, (1.0,), 1, 1, 1, 1.0, 1.0, 1 / len(depths)) for d in depths]

    line = _depth_line(Inspection(Path("x"), layers(0, 1, 2, 3, None)))
    assert line.startswith("depth: layer 0 20 %, layer 1 20 %, layers 2 to 3 40 % of the change; most in layer 0")
    assert line.endswith("; outside of the layers 20 %")
    alone = _depth_line(Inspection(Path("x"), layers(None)))
    assert alone == "depth: no update lies in a layer; outside of the layers 100 %"
    assert [_percent(share) for share in (0.0312, 0.31, 1.0, 3.01)] == ["3.1", "31", "100", "301"]


def test_inspect_counts_what_has_no_spectrum(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    from veneer.adapters import LoraConfig, attach
    from veneer.models import load_base

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["model.norm"], init_lora_weights=False)
    attach(load_base(tiny_base, dtype="float32", device="cpu"), config, seed=0).save(tmp_path / "a")
    done = cli("inspect", tmp_path / "a", "--no-picture")
    assert "beside the updates: 32 numbers in whole modules or rows of tokens" in done.out


def test_inspect_shows_every_layer_when_asked_and_needs_no_base(cli: Cli, own_run: Path, tmp_path: Path) -> None:
    done = cli("inspect", own_run / "adapter", "--layers", "--no-base", "--picture", tmp_path / "here.png")
    assert done.code == 0, done.err
    assert "model.layers.1.self_attn.v_proj" in done.out
    assert "% of base" not in done.out
    assert (tmp_path / "here.png").is_file()
    assert not (own_run / "adapter" / "inspect.png").exists()


def test_inspect_gives_json_and_nothing_else(cli: Cli, own_run: Path) -> None:
    done = cli("inspect", own_run, "--json", "--no-picture")
    values = json.loads(done.out)
    assert values["rank"] == 4
    assert values["picture"] is None
    assert len(values["layers"]) == 14
    assert set(values["depth_profile"]) == {"0", "1"}
    assert not (own_run / "inspect.png").exists()


def test_resize_prints_each_layers_error_and_the_metric_before_and_after(
    cli: Cli, run_folder: Path, tmp_path: Path
) -> None:
    done = cli("resize", run_folder, "--rank", "2", "--output", tmp_path / "small")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if "model.layers." in line]
    assert len(lines) == 14
    assert all(line.rstrip(" │").endswith("%") for line in lines)
    assert "rank 2: " in done.out
    assert "perplexity on 5 held-out rows: " in done.out
    assert "veneer eval" in done.out
    assert read_adapter(tmp_path / "small")[0].r == 2
    # What was written is an adapter like any other.
    assert cli("eval", tmp_path / "small", "--data", _rows(tmp_path), "-m", "perplexity", "-q").code == 0


def test_resize_gives_json_and_measures_other_rows_with_other_metrics(
    cli: Cli, run_folder: Path, tmp_path: Path
) -> None:
    done = cli(
        "resize", run_folder / "adapter", "--energy", "0.9", "--output", tmp_path / "small", "--json", "--quiet",
        "--data", _rows(tmp_path), "--metrics", "perplexity,exact_match", "--max-rows", "2",
    )  # fmt: skip
    values = json.loads(done.out)
    assert set(values["metrics"]) == {"perplexity", "exact_match"}
    assert values["measured_on"]["rows"] == 2
    assert all(0 <= layer["error"] <= 0.1**0.5 for layer in values["layers"].values())
    unmeasured = cli("resize", run_folder, "--rank", "1", "--output", tmp_path / "fast", "--no-measure", "--json")
    assert json.loads(unmeasured.out)["metrics"] == {}


def _rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": str(n)}) + "\n" for n in range(3)))
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("inspect", "{base}"), 1, "there is no adapter here"),
        (("inspect", "{tmp}/nowhere"), 1, "there is no such folder"),
        (("inspect", "{run}", "--directions", "-1"), 2, "--directions"),
        (("resize", "{run}", "--output", "{tmp}/new"), 2, "either a rank or a share of energy"),
        (("resize", "{run}", "--rank", "5", "--output", "{tmp}/new"), 2, "rank 5 is above the adapter's own 4"),
        (("resize", "{run}", "--energy", "99", "--output", "{tmp}/new"), 2, "the energy cannot be 99"),
        (("resize", "{run}", "--rank", "2", "--output", "{run}"), 2, "the output is taken"),
        (("resize", "{run}", "--rank", "2", "--output", "{run}", "--overwrite"), 2, "other files than an adapter's"),
        (("resize", "{run}", "--rank", "2", "--output", "{tmp}/new", "-m", "perplexityy"), 2, "perplexity"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    cli: Cli, own_run: Path, tiny_base: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    places = {"run": own_run, "base": tiny_base, "tmp": tmp_path}
    before = sorted(tmp_path.rglob("*"))
    done = cli(*(argument.format(**places) for argument in arguments))
    assert (done.code, said in done.err) == (code, True), done.said
    assert "Traceback" not in done.err
    assert sorted(tmp_path.rglob("*")) == before
