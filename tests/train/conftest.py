"""Small runs, in this process and through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Watcher

from veneer.recipe import Recipe, recipe_from
from veneer.train import TrainResult, train_recipe


@pytest.fixture
def values(tiny_base: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``values(train={...}, data={...})``: a recipe of 24 tiny rows, 4 of them held out, as a mapping."""

    def make(**changes: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = {
            "base": str(tiny_base),
            "dtype": "float32",
            "device": "cpu",
            "adapter": {"r": 4},
            "data": {"train": str(tiny_rows), "eval": 4},
            "train": {"num_train_epochs": 2, "learning_rate": 1e-2, "max_length": 64},
            "eval": {"samples": 0, "max_new_tokens": 6},
            "output_dir": str(tmp_path / "run"),
        }
        for key, value in changes.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        return recipe

    return make


@pytest.fixture
def recipe(values: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """``recipe(train={...}, ...)``: :func:`values` as a checked recipe."""
    return lambda **changes: recipe_from(values(**changes))


@pytest.fixture
def small_run(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., tuple[TrainResult, Watcher]]:
    """``small_run("name", train={...}, resume=True)`` trains in this process, into ``tmp_path/name``."""

    def run(
        name: str = "run",
        *,
        resume: bool = False,
        overwrite: bool = False,
        strict: bool = False,
        explain: bool = False,
        **changes: Any,
    ) -> tuple[TrainResult, Watcher]:
        watcher = Watcher()
        made = recipe(**{"output_dir": str(tmp_path / name), **changes})
        how = {"resume": resume, "overwrite": overwrite, "strict": strict, "explain": explain}
        return train_recipe(made, progress=watcher, **how), watcher

    return run


@pytest.fixture
def write_recipe(values: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """``write_recipe("name", train={...})``: ``name.yaml`` in ``tmp_path``, whose run goes to ``tmp_path/name``."""

    def write(name: str = "run", **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values(**{"output_dir": str(tmp_path / name), **changes})), encoding="utf-8")
        return path

    return write


@pytest.fixture
def start_train(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``start_train(recipe, "--resume", processes=2)`` starts the command line's ``train`` and does not wait for it."""

    def start(recipe: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
        launcher = ["-m", "veneer"]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher]
        return subprocess.Popen(
            [sys.executable, *launcher, "train", str(recipe), *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
