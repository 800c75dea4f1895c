"""What a run says while it works."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from veneer.cli import output, progress
from veneer.cli.progress import Bar, Counter, Lines, Pace, Quiet, duration, evaluation_text, training_progress

STEP = {"loss": 1.25, "tokens_per_second": 1234.5}


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_time_left_counts_only_the_steps_of_this_process(clock: Clock) -> None:
    pace = Pace(total_steps=100, resumed_step=90)
    assert pace.left(90) == ""
    clock.now = 20.0
    assert pace.left(92) == "~80 s"
    assert pace.left(100) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (150, "2.5 min"), (3000, "50 min"), (7800, "2 h 10 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_the_first_the_last_and_now_and_then_a_step(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines()
    lines.start(100, 0, "tiny")
    for step in range(1, 101):
        clock.now += 1.0
        lines.step({"step": step, **STEP})
    lines.evaluation({"step": 100, "epoch": 1.0, "eval_loss": 0.5, "eval_exact_match": 0.81, "eval_perplexity": 1.6487})
    lines.message("careful", "warning")
    lines.close()
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert captured.out == ""
    assert said[0] == "tiny: 100 steps"
    assert said[1] == "step 1/100  loss 1.2500  1,234 tokens/s  ~1.6 min left"
    assert [line.split()[1] for line in said[2:-2]] == [f"{n}/100" for n in (11, 21, 31, 41, 51, 61, 71, 81, 91, 100)]
    assert said[-2] == "step 100: held-out loss 0.5000, exact_match 81.0 %, perplexity 1.65"
    assert said[-1] == "warning: careful"


def test_a_resumed_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Lines().start(10, 4, "tiny")
    assert capsys.readouterr().err == "tiny: 10 steps, resumed after step 4\n"


def test_quiet_keeps_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    quiet.start(1, 0, "tiny")
    quiet.step({"step": 1, **STEP})
    quiet.evaluation({"step": 1, "eval_loss": 1.0})
    quiet.message("fine")
    quiet.message("careful", "warning")
    quiet.close()
    assert capsys.readouterr().err == "warning: careful\n"


def test_where_there_is_no_terminal_there_is_no_bar() -> None:
    assert type(training_progress()) is Lines
    assert type(training_progress(quiet=True)) is Quiet


def test_the_bar_shows_loss_speed_and_steps_and_lets_messages_pass_above(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress,
        "console",
        lambda **_: Console(file=screen, force_terminal=True, width=100, highlight=False, markup=False),
    )
    bar = Bar()
    bar.message("19 rows [of 24]")
    bar.start(10, 0, "tiny")
    clock.now = 5.0
    bar.step({"step": 5, **STEP})
    bar.evaluation({"step": 5, "eval_loss": 0.25})
    bar.message("careful", "warning")
    bar.close()
    bar.close()  # a run may end in an error after its end
    shown = screen.getvalue()
    assert "19 rows [of 24]" in shown
    assert "step 5: held-out loss 0.2500" in shown
    assert "\x1b[33mwarning: careful\x1b[0m" in shown
    assert "\x1b[33mtiny" not in shown, "the warning's colour must stay with the warning"
    assert "5/10" in shown
    assert "loss 1.2500  1,234 tokens/s  ~5 s left" in shown


def test_the_evaluation_before_training_is_told_as_such() -> None:
    assert evaluation_text({"step": 0, "eval_loss": 2.0}) == "before training: held-out loss 2.0000"


def test_a_counter_tells_each_part_and_its_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    counter = Counter()
    for what in ("adapter: answers", "base: answers"):
        for done in range(0, 41, 10):
            clock.now += 4.0
            counter(what, done, 40)
    assert capsys.readouterr().err.splitlines() == [
        "adapter: answers: 0/40",
        "adapter: answers: 30/40  ~4 s left",
        "adapter: answers: 40/40",
        "base: answers: 0/40",
        "base: answers: 30/40  ~4 s left",
        "base: answers: 40/40",
    ]
    Counter(quiet=True)("x", 1, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_null_where_a_number_is_none(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    document: dict[str, Any] = {"a": [value, 1.5], "b": {"c": value}}
    output.print_json(document)
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_while_stdout_is_reserved_prints_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with output.stdout_reserved():
        print("chatter")
    print("document")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("document\n", "chatter\n")
