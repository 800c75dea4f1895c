"""Signals: the first is a request, the second an order."""

import os
import signal
import threading

import pytest

from veneer.train.interrupt import EvaluationInterrupted, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_later_one_stops_at_once(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("veneer.train.interrupt.time.monotonic", lambda: clock[0])
    said: list[str] = []
    with StopRequest(said.append).listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert said == ["stopping after this step, with a checkpoint; once more to stop at once"]
        clock[0] += 0.1
        os.kill(os.getpid(), number)  # the same request, sent to the process and to its group
        clock[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest(print).listening():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_evaluation_is_cut_off_where_that_is_allowed() -> None:
    with StopRequest(pytest.fail).listening() as stop:
        with pytest.raises(EvaluationInterrupted), stop.abandoning(allowed=True):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_an_evaluation_that_others_wait_for_is_finished() -> None:
    with StopRequest(lambda text: None).listening() as stop:
        with stop.abandoning(allowed=False):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with StopRequest(print).listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
