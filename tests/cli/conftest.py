"""The command line inside the test's process, and one finished run for the commands that need one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from veneer.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``cli("train", "recipe.yaml")`` runs a command without the price of a new process."""
    monkeypatch.setenv("VENEER_DEBUG", "0")

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_rows: Path) -> Path:
    """A run of three steps, with five rows held out. Read only: it is shared."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"base: {tiny_base}\ndtype: float32\n"
        f"data: {{train: {tiny_rows}, eval: 5}}\n"
        "adapter: {r: 4}\n"
        "train: {max_steps: 3, per_device_train_batch_size: 4, max_length: 64, learning_rate: 1e-2}\n"
        "eval: {metrics: [exact_match], max_new_tokens: 4, samples: 1}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    silent = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(2), os.dup(1)
    os.dup2(silent, 2), os.dup2(silent, 1)
    try:
        main(["train", str(recipe)])
    except SystemExit as left:
        if left.code:
            raise RuntimeError("the run that the tests share could not be trained") from left
    finally:
        sys.stdout.flush()
        os.dup2(kept[0], 2), os.dup2(kept[1], 1)
        for number in (silent, *kept):
            os.close(number)
    return folder / "run"
