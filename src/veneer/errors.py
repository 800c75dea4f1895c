"""The error family: every message says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130


class VeneerError(Exception):
    """An error that a user can act on.

    Args:
        what: one sentence that names the problem.
        where: the file, line, row, key or layer it was found in.
        fix: what to do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class UsageError(VeneerError):
    """The command or a function's arguments are wrong."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """The recipe is wrong: an unknown key, a value out of range, keys that exclude each other."""


class DataError(VeneerError):
    """A data file cannot be read, or its rows cannot be trained on."""


class ModelError(VeneerError):
    """A base model cannot be found, read or run."""


class AdapterError(VeneerError):
    """An adapter does not fit: unmatched config entries, tensors left over or missing, another base."""


class TrainError(VeneerError):
    """Training cannot go on: NaN, a tensor without gradient, an unusable checkpoint."""


class StorageError(VeneerError):
    """A file cannot be written: full disk, no permission."""


class GateError(VeneerError):
    """A quality gate did not hold."""

    exit_code = EXIT_GATE


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates closest in spelling to ``name``, best first (none when nothing is close)."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.55)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A sentence such as "Did you mean 'q_proj'?", or the empty string when nothing is close."""
    close = nearest(name, candidates)
    if not close:
        return ""
    return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
