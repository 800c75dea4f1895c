"""What the tests of training share: a progress that remembers, and metrics without the times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMING = ("seconds", "tokens_per_second")


class Watcher:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.messages: list[tuple[str, str]] = []
        self.started: list[tuple[int, int, str]] = []
        self.closed = 0
        self.loaded = (0, 0)

    def loading(self, done: int, total: int) -> None:
        self.loaded = (done, total)

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        self.started.append((total_steps, resumed_step, description))

    def step(self, values: Mapping[str, Any]) -> None:
        self.steps.append(dict(values))

    def evaluation(self, values: Mapping[str, Any]) -> None:
        self.evaluations.append(dict(values))

    def message(self, text: str, level: str = "info") -> None:
        self.messages.append((level, text))

    def close(self) -> None:
        self.closed += 1

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self.messages if level == "warning"]


def lines(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without the times, which no two runs share."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in text.splitlines()]
