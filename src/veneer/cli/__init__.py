"""The command line: one file per command, each a thin shell over one public function. Importing it imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``veneer`` with ``argv`` (by default the process's own arguments) and exits.

    Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 a gate failed, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in arguments:  # a global option, but nobody remembers where global options go
        arguments.remove("--debug")
        os.environ["VENEER_DEBUG"] = "1"
    from veneer.cli.app import app
    from veneer.cli.guard import flush_or_leave

    try:
        app(arguments, prog_name="veneer")
    finally:
        flush_or_leave()
