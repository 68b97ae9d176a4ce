"""Signals become a wish to stop, then an order."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from fedtailor.core.errors import Interrupted
from fedtailor.experiment.launch import StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_wish_with_its_own_exit_code(number: int, code: int) -> None:
    told: list[str] = []
    with StopSignals(told.append, graceful=True) as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.exit_code == code
    assert len(told) == 1


def test_a_second_signal_ends_at_once() -> None:
    with StopSignals(lambda _: None, graceful=True):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_segment_that_does_not_end_is_given_up_after_the_grace() -> None:
    with StopSignals(lambda _: None, grace_s=0.05, graceful=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            time.sleep(5)
        assert stop.exit_code == 143


def test_before_there_is_a_run_the_first_signal_ends_at_once() -> None:
    with StopSignals(lambda _: None), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_that_somebody_else_installs_meanwhile_are_replaced() -> None:
    with StopSignals(lambda _: None, graceful=True) as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_the_handlers_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(lambda _: None):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_it_may_be_asked_from_another_thread() -> None:
    answers: list[bool] = []
    with StopSignals(lambda _: None) as stop:
        thread = threading.Thread(target=lambda: answers.append(stop()))
        thread.start()
        thread.join()
    assert answers == [False]
