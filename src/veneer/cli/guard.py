"""Where a command's errors end: one short block on stderr and an exit code, never a traceback unless ``--debug``."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer

from veneer.errors import EXIT_FAILED, EXIT_INTERRUPTED, VeneerError
from veneer.files import storage_problem

F = TypeVar("F", bound=Callable[..., Any])

_TRAIN_LESS = (
    "lower train.micro_batch_tokens (with packing) or train.per_device_train_batch_size, or train.max_length; "
    "set train.gradient_checkpointing=true; use dtype=bfloat16. "
    "train.gradient_accumulation_steps makes up for a smaller batch: the maths stays the same"
)
_ASK_LESS = "lower --batch-size or --max-new-tokens, use --dtype bfloat16, or a smaller base"
_LESS = {"train": _TRAIN_LESS, "demo": _TRAIN_LESS, "evaluate": _ASK_LESS, "generate": _ASK_LESS, "chat": _ASK_LESS}

_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE
)


def guarded(command: F) -> F:
    """A command whose errors become messages; ``typer`` sees the same signature."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            _leave_quietly()
        except Exception as error:
            if debugging():
                traceback.print_exc()
            problem = as_problem(error, command.__name__)
            print_problem(problem)
            raise typer.Exit(problem.exit_code) from None

    return run  # type: ignore[return-value]  # functools.wraps keeps the signature, which mypy cannot see


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("VENEER_DEBUG", "0") not in ("", "0")


class BugError(VeneerError):
    """An error that no user could have caused."""


def as_problem(error: BaseException, verb: str = "") -> VeneerError:
    """The error as a message to a user: itself, or what a library's error means, or a bug of ours."""
    if isinstance(error, VeneerError):
        return error
    text = str(error)
    if _is_out_of_memory(error, text):
        fix = _LESS.get(verb, "use --dtype bfloat16, a smaller base, or a machine with more memory")
        return VeneerError(f"out of memory{_in_words(text)}", fix=fix)
    if problem := storage_problem(error):
        return problem
    if isinstance(error, FileNotFoundError):
        return VeneerError("no such file or folder", where=error.filename, fix="check the path")
    if isinstance(error, OSError) and error.errno is not None:
        return VeneerError(error.strerror or text, where=error.filename)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("veneer"):
        return VeneerError(
            f"the package '{error.name}' is not installed", fix=f"pip install {error.name.partition('.')[0]}"
        )
    return BugError(
        f"this is a bug in Veneer: {type(error).__name__}: {text.strip() or 'no message'}",
        where=_place(error),
        fix="run the command again with --debug, and report what it prints",
    )


def print_problem(problem: VeneerError) -> None:
    """The block on stderr: what, where, fix; in colour on a terminal."""
    red, bold, dim, off = ("\x1b[31m", "\x1b[1m", "\x1b[2m", "\x1b[0m") if _in_colour() else ("", "", "", "")
    lines = [f"{red}{bold}error:{off} {problem.what}"]
    if problem.where:
        lines.append(f"{dim}where:{off} {problem.where}")
    if problem.fix:
        lines.append(f"{dim}fix:{off}   {problem.fix}")
    sys.stdout.flush()
    print("\n".join(lines), file=sys.stderr, flush=True)


def flush_or_leave() -> None:
    """Flushes stdout while a closed pipe can still be met with silence (``veneer eval ... | head``)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_quietly()


def _leave_quietly() -> NoReturn:
    # The interpreter flushes stdout once more at its end, and would complain; so there has to be a stdout.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(EXIT_FAILED)


def _in_colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    torch = sys.modules.get("torch")  # if it was never imported, it cannot be its error
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(text))


def _in_words(text: str) -> str:
    """How much was asked for, where the allocator says it."""
    asked = re.search(r"tried to allocate (\d+ bytes|[\d.]+ ?[KMGT]?i?B)", text, re.IGNORECASE)
    return f": {asked.group(1)} more were needed" if asked else ""


def _place(error: BaseException) -> str | None:
    """The innermost line of our own that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}veneer{os.sep}" in f.filename and not f.filename.endswith("guard.py")]
    if not ours:
        return None
    last = ours[-1]
    short = last.filename[last.filename.rindex(f"{os.sep}veneer{os.sep}") + 1 :]
    return f"{short}:{last.lineno}, in {last.name}"
