"""Errors end as one block and an exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer

from veneer.cli.guard import as_problem, guarded
from veneer.errors import DataError, GateError, StorageError, UsageError, VeneerError


def leave(error: BaseException) -> int:
    """The exit code of a command that raises ``error``."""

    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        guarded(command)()
    return caught.value.exit_code


def test_an_error_is_said_in_three_lines_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(DataError("the rows are empty", where="rows.jsonl", fix="fill them")) == 1
    assert capsys.readouterr().err == "error: the rows are empty\nwhere: rows.jsonl\nfix:   fill them\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 1),
        (UsageError("x"), 2),
        (GateError("x"), 3),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (MemoryError(), 1),
    ],
)
def test_the_exit_code_tells_what_kind_of_error_it_was(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(error) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_surprise_is_called_a_bug_of_ours_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        from veneer.recipe.yamlio import parse

        parse(None)  # type: ignore[arg-type]  # the surprise

    with pytest.raises(typer.Exit):
        guarded(command)()
    said = capsys.readouterr().err
    assert said.startswith("error: this is a bug in Veneer: ")
    assert "where: veneer/recipe/yamlio.py:" in said
    assert "--debug" in said


def test_debug_shows_the_traceback_and_the_same_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VENEER_DEBUG", "1")
    assert leave(UsageError("x")) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: x\n")


@pytest.mark.parametrize("place", [["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]])
def test_debug_may_stand_anywhere(veneer: Callable[..., Any], place: list[str]) -> None:
    done = veneer(*place)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "kind", "fragment"),
    [
        (OSError(errno.ENOSPC, "no space", "/x/y"), StorageError, "the disk is full"),
        (OSError(errno.EACCES, "denied", "/x/y"), StorageError, "no permission"),
        (OSError(errno.EROFS, "read-only", "/x/y"), StorageError, "no permission"),
        (OSError(errno.ENOTDIR, "not a folder", "/x/y"), StorageError, "in the way"),
        (OSError(errno.EFBIG, "too large", "/x/y"), StorageError, "larger than this system allows"),
        (OSError(errno.ENOENT, "no such file", "/x/y"), VeneerError, "no such file"),
        (OSError(errno.EIO, "Input/output error", "/x/y"), VeneerError, "Input/output error"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StorageError, "the disk is full"),
        (RuntimeError("I/O error: File too large (os error 27)"), StorageError, "larger than this system allows"),
        (RuntimeError("Permission denied (os error 13)"), StorageError, "no permission"),
        (MemoryError(), VeneerError, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), VeneerError, "2.50 GiB more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
            VeneerError,
            "4096 bytes more",
        ),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            VeneerError,
            "the package 'wandb' is not installed",
        ),
    ],
)
def test_what_the_system_and_libraries_say_is_translated(
    error: Exception, kind: type[VeneerError], fragment: str
) -> None:
    problem = as_problem(error, "train")
    assert type(problem) is kind
    assert fragment in problem.what
    assert "bug" not in problem.what
    if isinstance(error, OSError):
        assert problem.where == "/x/y"


def test_out_of_memory_says_what_to_lower_in_the_words_of_the_command() -> None:
    assert "train.gradient_checkpointing=true" in str(as_problem(MemoryError(), "train").fix)
    assert "--batch-size" in str(as_problem(MemoryError(), "generate").fix)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    closed = _closed_pipe()
    done = subprocess.run(
        [sys.executable, "-m", "veneer", "recipe"], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(closed)
    assert done.stderr == ""
    assert done.returncode == 1


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_ctrl_c_exits_with_130_and_no_traceback() -> None:
    program = (
        "import os, signal, veneer.cli.version, veneer.cli.output\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs start with it ignored
        "def stop(value): os.kill(os.getpid(), signal.SIGINT)\n"
        "veneer.cli.output.print_json = stop\n"
        "veneer.cli.main(['version', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
