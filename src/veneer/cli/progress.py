"""How a run looks while it works: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from veneer.cli.output import console

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar

    from veneer.train.progress import Progress

LOG_EVERY_SECONDS = 10.0  # between two lines of a log, but the first steps and the last one are always told


def training_progress(*, quiet: bool = False) -> Progress:
    """The progress of ``veneer train`` on stderr: a bar, lines, or nothing but warnings."""
    if quiet:
        return Quiet()
    return Bar() if sys.stderr.isatty() else Lines()


class Pace:
    """Time left, from the steps of this process alone: those before a resume cost it nothing."""

    def __init__(self, total_steps: int, resumed_step: int) -> None:
        self.total_steps = total_steps
        self._first = resumed_step
        self._began = time.monotonic()

    def left(self, step: int) -> str:
        """Estimated time to the last step, evaluations included: "~3 min"; "" before anything is known."""
        done = step - self._first
        if done <= 0 or step >= self.total_steps:
            return ""
        return "~" + duration((time.monotonic() - self._began) / done * (self.total_steps - step))


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best: "42 s", "3.5 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 10:
        return f"{minutes:.1f} min"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def evaluation_text(values: Mapping[str, Any]) -> str:
    """An evaluation's line: ``step 40: held-out loss 0.812, perplexity 2.25, exact_match 81.0 %``."""
    parts: list[str] = []
    for key, value in values.items():
        name = key.removeprefix("eval_")
        if name == key or not isinstance(value, int | float):
            continue
        if name == "loss":
            parts.insert(0, f"held-out loss {value:.4f}")
        elif name == "perplexity":
            parts.append(f"perplexity {value:.3g}")
        elif 0 <= value <= 1:
            parts.append(f"{name} {100 * value:.1f} %")
        else:
            parts.append(f"{name} {value:.4g}")
    step = values.get("step")
    begin = "before training" if step == 0 else f"step {step}"
    return f"{begin}: {', '.join(parts)}"


class Lines:
    """For a log: a line every few seconds, each evaluation, each message."""

    def __init__(self) -> None:
        self._pace = Pace(0, 0)
        self._last = float("-inf")
        self._loading = Counter()

    def loading(self, done: int, total: int) -> None:
        self._loading("reading and quantising the base", done, total)

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        self._pace = Pace(total_steps, resumed_step)
        after = f", resumed after step {resumed_step}" if resumed_step else ""
        self._print(f"{description}: {total_steps} steps{after}")

    def step(self, values: Mapping[str, Any]) -> None:
        now, step = time.monotonic(), int(values["step"])
        if now - self._last < LOG_EVERY_SECONDS and step < self._pace.total_steps:
            return
        self._last = now
        left = self._pace.left(step)
        self._print(
            f"step {step}/{self._pace.total_steps}  loss {values['loss']:.4f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s" + (f"  {left} left" if left else "")
        )

    def evaluation(self, values: Mapping[str, Any]) -> None:
        self._print(evaluation_text(values))

    def message(self, text: str, level: str = "info") -> None:
        self._print(f"warning: {text}" if level == "warning" else text)

    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Quiet(Lines):
    """Only what should not be missed."""

    def loading(self, done: int, total: int) -> None: ...

    def start(self, total_steps: int, resumed_step: int, description: str) -> None: ...

    def step(self, values: Mapping[str, Any]) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def message(self, text: str, level: str = "info") -> None:
        if level == "warning":
            super().message(text, level)


class Bar:
    """For a terminal: one bar with loss, speed and time left; evaluations and messages scroll by above it."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bar: RichBar | None = None
        self._task: Any = None
        self._pace = Pace(0, 0)
        self._loading = Counter()

    def loading(self, done: int, total: int) -> None:
        self._loading("reading and quantising the base", done, total)

    def start(self, total_steps: int, resumed_step: int, description: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._pace = Pace(total_steps, resumed_step)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(description, total=total_steps, completed=resumed_step, figures="")
        self._bar.start()

    def step(self, values: Mapping[str, Any]) -> None:
        if self._bar is None:
            return
        step = int(values["step"])
        left = self._pace.left(step)
        figures = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, figures=figures + (f"  {left} left" if left else ""))

    def evaluation(self, values: Mapping[str, Any]) -> None:
        self._print(evaluation_text(values), "")

    def message(self, text: str, level: str = "info") -> None:
        if level == "warning":
            self._print(f"warning: {text}", "yellow")
        else:
            self._print(text, "dim")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        # The bar's own console, while there is a bar: it knows how to write above it. The style goes with the text:
        # given to print, it would colour the bar that is drawn again below, too.
        (self._bar.console if self._bar else self._console).print(Text(text, style=style), soft_wrap=True)


class Counter:
    """``progress(what, done, total)`` of an evaluation: a line that rewrites itself, or one for each part in a log."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._began = time.monotonic()
        self._what = ""
        self._last = float("-inf")

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._last = what, now, float("-inf")
        if self._quiet or (now - self._last < (0.1 if self._live else LOG_EVERY_SECONDS) and done < total):
            return
        self._last = now
        seconds = now - self._began
        left = f"  ~{duration(seconds / done * (total - done))} left" if 0 < done < total else ""
        text = f"{what}: {done}/{total}{left}"
        if self._live:
            print(f"\r\x1b[2K{text}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
