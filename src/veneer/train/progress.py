"""How a run tells what it is doing: the protocol that the command line's progress bar fulfils, and silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """What a training run reports to; every call comes from the main process only."""

    def loading(self, done: int, total: int) -> None:
        """The base is being read and quantised: ``done`` of ``total`` tensors are."""

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        """The run begins: ``resumed_step`` of ``total_steps`` optimizer steps are done already."""

    def step(self, values: Mapping[str, Any]) -> None:
        """An optimizer step is done; ``values`` is its line of ``metrics.jsonl``."""

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """A held-out evaluation is done; ``values`` is its line of ``metrics.jsonl``."""

    def message(self, text: str, level: str = "info") -> None:
        """Something worth saying; ``level`` is "info" or "warning"."""

    def close(self) -> None:
        """The run is over, however it ended."""


class Silent:
    """Reports nothing: the default of the Python API, and every process but the first."""

    def loading(self, done: int, total: int) -> None: ...

    def start(self, total_steps: int, resumed_step: int, description: str) -> None: ...

    def step(self, values: Mapping[str, Any]) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def message(self, text: str, level: str = "info") -> None: ...

    def close(self) -> None: ...
