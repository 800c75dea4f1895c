"""What goes where: results on stdout, everything else on stderr; with ``--json`` stdout holds one JSON document."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_LOG_WIDTH = 120  # of a table in a log, where there is no terminal to ask


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr, with a fixed width where that is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _LOG_WIDTH, highlight=False, markup=False)


def say(text: str) -> None:
    """A line for people: on stderr, so that it is in nobody's way."""
    print(text, file=sys.stderr, flush=True)


def short_path(path: Path) -> str:
    """Relative to the working directory where it is below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_json(value: Any) -> None:
    """The document of ``--json``: NaN and infinity, which JSON does not have, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


@contextlib.contextmanager
def stdout_reserved(reserved: bool = True) -> Iterator[None]:
    """While open and ``reserved``, what anybody prints goes to stderr."""
    if not reserved:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
