"""The demo from end to end on a tiny random model, its recipe, its data files and its table."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer.demo.run
from veneer.demo import demo_table, generate_rows, run_demo, write_demo_data
from veneer.demo.run import METRICS, demo_recipe, write_data
from veneer.errors import RecipeError, TrainError

MASTER = Path(veneer.demo.run.__file__).parent / "demo.yaml"
RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_recipe_in_recipes_is_the_one_that_the_package_carries() -> None:
    assert (RECIPES / "demo.yaml").read_text(encoding="utf-8") == MASTER.read_text(encoding="utf-8")


def test_the_data_files_hold_the_rows_and_no_message_is_in_two_of_them(tmp_path: Path) -> None:
    paths = write_data(tmp_path, train_rows=60, validation_rows=10, heldout_rows=20)
    rows = {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
    }
    assert {name: len(part) for name, part in rows.items()} == {"train": 60, "validation": 10, "heldout": 20}
    assert rows["train"] == generate_rows(60, 0, "train")
    assert rows["heldout"] == generate_rows(20, 0, "heldout")
    texts = [row["messages"][1]["content"] for part in rows.values() for row in part]
    assert len(set(texts)) == 90


def test_the_data_files_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = write_data(tmp_path / "a", train_rows=20, validation_rows=2, heldout_rows=5)
    second = write_data(tmp_path / "b", train_rows=20, validation_rows=2, heldout_rows=5)
    assert [path.read_bytes() for path in first.values()] == [path.read_bytes() for path in second.values()]


def test_the_recipe_takes_the_demos_files_and_overrides_even_in_a_folder_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my runs: #1"
    data = write_data(folder / "data", train_rows=8, validation_rows=2, heldout_rows=2)
    recipe = demo_recipe(folder, data, ["train.max_steps=3"])
    assert recipe.base == "smollm2-135m"
    assert recipe.output_dir == str(folder)
    assert recipe.data.train == str(data["train"])
    assert recipe.data.eval == str(data["validation"])
    assert recipe.train.max_steps == 3


def test_a_wrong_override_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = write_data(tmp_path, train_rows=2, validation_rows=2, heldout_rows=2)
    with pytest.raises(RecipeError, match="learning_rat"):
        demo_recipe(tmp_path, data, ["train.learning_rat=1"])


Finished = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(make_tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("demo") / "run"
    overrides = [f"base={make_tiny_base(max_position_embeddings=1024)}", "train.max_steps=2", "train.max_length=1024"]
    overrides += ["train.per_device_train_batch_size=4", "eval.max_new_tokens=4", "eval.samples=1"]
    overrides += ["dtype=float32", "device=cpu"]
    return folder, run_demo(folder, overrides=overrides, train_rows=8, validation_rows=2, heldout_rows=3)


def test_the_demo_writes_its_figures_adapter_report_and_answers(finished: Finished) -> None:
    folder, result = finished
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8")) == result
    for name in METRICS:
        assert result["before"][name] == result["after"][name] == 0.0  # two steps teach a random model nothing
    assert 0 < result["train_seconds"] <= result["total_seconds"]
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result["adapter_mb"] == pytest.approx(size / 1e6, abs=0.01)
    assert 0.05 < result["peak_rss_gb"] < 64
    assert result["tokens_per_second"] > 0
    assert (folder / "report.html").is_file()
    assert len(json.loads((folder / "eval" / "heldout.json").read_text(encoding="utf-8"))["rows"]) == 3


@pytest.fixture(scope="module")
def one_step(make_tiny_base: Callable[..., Path]) -> dict[str, Any]:
    """Arguments of the shortest demo there is."""
    overrides = [f"base={make_tiny_base(max_position_embeddings=1024)}", "train.max_steps=1", "train.max_length=1024"]
    overrides += ["eval.max_new_tokens=2", "eval.samples=0", "dtype=float32", "device=cpu"]
    return {"overrides": overrides, "train_rows": 2, "validation_rows": 1, "heldout_rows": 1}


def test_the_demo_prints_nothing(one_step: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    run_demo(tmp_path / "run", **one_step)
    assert capfd.readouterr() == ("", "")


def test_a_demo_replaces_an_earlier_one(one_step: dict[str, Any], tmp_path: Path) -> None:
    run_demo(tmp_path, **one_step)
    second = run_demo(tmp_path, **{**one_step, "heldout_rows": 2})
    assert second["heldout_rows"] == 2
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8")) == second


def test_a_demo_never_replaces_another_run(one_step: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(TrainError, match="holds a run already"):
        run_demo(tmp_path, **one_step)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_rows_alone_are_those_that_the_demo_writes(one_step: dict[str, Any], tmp_path: Path) -> None:
    paths = write_demo_data(tmp_path / "run")
    assert {path.parent for path in paths.values()} == {tmp_path / "run" / "data"}
    assert [len(path.read_text().splitlines()) for path in paths.values()] == [1200, 40, 200]
    assert run_demo(tmp_path / "run", **one_step)["heldout_rows"] == 1  # no --overwrite is asked for


def test_the_rows_are_not_written_into_another_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(TrainError, match="holds a run already"):
        write_demo_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_table_shows_before_and_after_and_what_to_type_next() -> None:
    from rich.console import Console

    values = dict.fromkeys(("json_valid", "json_exact", "json_fields", "json_fields.intent"))
    result = {
        "before": {**values, "json_valid": 0.02, "json_exact": 0.0, "json_fields": 0.01, "json_fields.intent": 0.005},
        "after": {**values, "json_valid": 1.0, "json_exact": 0.935, "json_fields": 0.985, "json_fields.intent": 0.99},
        "train_seconds": 301.2,
        "total_seconds": 425.0,
        "adapter_mb": 19.6,
        "peak_rss_gb": 1.94,
        "tokens_per_second": 512.3,
        "train_rows": 1200,
        "heldout_rows": 200,
        "run": "runs/demo",
        "report": "runs/demo/report.html",
        "heldout": "runs/demo/data/heldout.jsonl",
    }
    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(demo_table(result))
    text = stream.getvalue()
    for part in ("93.5 %", "100.0 %", "0.5 %", "intent", "200 held-out", "report: runs/demo/report.html"):
        assert part in text
    for part in ("5 min 01 s", "7 min 05 s", "512 tokens/s", "19.6 MB", "1.9 GB"):
        assert part in text
    for part in ("veneer chat runs/demo", "veneer data show runs/demo"):
        assert part in text
