"""Ctrl-C that loses nothing: the first one finishes the step and writes a checkpoint, the second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# timeout(1) and process managers send one request to the process and to its group: two signals, one wish.
SAME_REQUEST_SECONDS = 0.5


class EvaluationInterrupted(Exception):
    """Raised out of an evaluation, which can be begun again; never leaves the training loop."""


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        requested: set by SIGINT or SIGTERM, or by hand.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._asked = float("-inf")  # when, by the monotonic clock
        self._say = say
        self._raise_now = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Takes over SIGINT and SIGTERM while it is open; outside the main thread signals are left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def abandoning(self, allowed: bool) -> Iterator[None]:
        """Where ``allowed``, a signal inside raises :class:`EvaluationInterrupted` instead of waiting for the end."""
        self._raise_now = allowed
        try:
            yield
        finally:
            self._raise_now = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            if now - self._asked < SAME_REQUEST_SECONDS:
                return
            raise KeyboardInterrupt
        self.requested, self._asked = True, now
        if self._raise_now:
            self._raise_now = False
            raise EvaluationInterrupted
        # A signal may come in the middle of a write to the same stream, which Python refuses to begin again.
        with contextlib.suppress(RuntimeError):
            self._say("stopping after this step, with a checkpoint; once more to stop at once")
