"""How the command line is called: help, versions, slips; and that nothing heavy is imported for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import veneer as package

VERBS = ("demo", "train", "eval", "generate", "chat", "merge", "recipe", "version", "bench", "data")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["train", "--help"], ["data", "check", "--help"], ["--version"]]
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, veneer.cli\n"
        f"try:\n    veneer.cli.main({arguments!r})\nexcept SystemExit as left:\n    assert not left.code\n"
        "print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr == "[]\n"
    assert done.stdout


def test_help_names_every_verb(cli: Callable[..., Any]) -> None:
    done = cli("--help")
    assert done.code == 0
    for verb in VERBS:
        assert f"  {verb} " in done.out


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "data"] + ["data check", "data show"])
def test_every_verb_has_a_help_that_says_what_it_does(cli: Callable[..., Any], verb: str) -> None:
    done = cli(*verb.split(), "--help")
    assert done.code == 0
    assert f"veneer {verb}" in done.out
    assert len(done.out.splitlines()[2].strip()) > 10


def test_the_version_is_the_packages(cli: Callable[..., Any], veneer: Callable[..., Any]) -> None:
    assert cli("--version").out == f"veneer {package.__version__}\n"
    assert veneer("--version").stdout == f"veneer {package.__version__}\n"
    done = cli("version")
    assert f"veneer         {package.__version__}" in done.out
    assert "torch" in done.out


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["trian"], "trian"),
        (["train"], "RECIPE"),
        (["train", "recipe.yaml", "--resum"], "--resum"),
        (["eval", "x", "--max-rows", "0"], "--max-rows"),
        (["generate", "x", "--temperature", "-1"], "--temperature"),
        (["merge", "x"], "--output"),
        ([], "Usage: veneer"),
        (["data"], "Usage: veneer data"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_slip(
    cli: Callable[..., Any], arguments: list[str], fragment: str
) -> None:
    done = cli(*arguments)
    assert done.code == 2
    assert fragment in done.said
    assert "Traceback" not in done.said


def test_the_recipe_command_lists_the_keys_and_fills_in_a_recipe(cli: Callable[..., Any], tmp_path: Any) -> None:
    assert "| `train.learning_rate` | `0.0002` | a number above 0 |" in cli("recipe").out
    (tmp_path / "r.yaml").write_text("base: b\ndata: {train: org/rows}\n")
    done = cli("recipe", tmp_path / "r.yaml", "train.seed=5")
    assert "\n  seed: 5 " in done.out
    (tmp_path / "again.yaml").write_text(done.out)
    assert cli("recipe", tmp_path / "again.yaml").out == done.out


def test_bench_passes_its_arguments_on_and_names_the_benchmarks(cli: Callable[..., Any]) -> None:
    done = cli("bench", "stf")
    assert done.code == 2
    assert "unknown benchmark 'stf'" in done.err
    assert "sft" in done.err
    command = [sys.executable, "-m", "veneer", "bench", "sft", "--peers", "axolotl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "unknown peer 'axolotl'" in done.stderr
