"""Stop requests by real signals to this very process."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from vitscale.train.signals import STOP_SIGNALS, StopRequest


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # a chance for the handler to run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.received is None
        send(number)
        assert stop.received == number.name
        send(number)
        assert stop.received == number.name


def test_the_newest_signal_is_reported() -> None:
    with StopRequest() as stop:
        send(signal.SIGUSR2)
        send(signal.SIGTERM)
        assert stop.received == "SIGTERM"


def test_handlers_are_restored_also_after_an_error() -> None:
    def mine(*_: object) -> None: ...

    def fail() -> None:
        with StopRequest():
            assert all(signal.getsignal(number) not in (before[number], mine) for number in STOP_SIGNALS)
            raise RuntimeError

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGUSR2, mine)
    try:
        with pytest.raises(RuntimeError):
            fail()
        assert signal.getsignal(signal.SIGUSR2) is mine
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGUSR2, before[signal.SIGUSR2])


def test_a_signal_in_the_middle_of_work_does_not_break_it() -> None:
    with StopRequest() as stop:
        reader, writer = os.pipe()
        old = signal.signal(signal.SIGALRM, lambda *_: (send(signal.SIGTERM), os.write(writer, b"x")))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            # The read is interrupted by both signals and goes on.
            assert os.read(reader, 1) == b"x"
        finally:
            signal.signal(signal.SIGALRM, old)
            os.close(reader)
            os.close(writer)
        assert stop.received == "SIGTERM"


def test_a_signal_that_was_blocked_until_now_is_noted_and_a_late_one_kills_nobody() -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # To this thread: others of this process, unlike those of a rank, do not block it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        with StopRequest() as stop:
            assert stop.received == "SIGUSR2"
        assert set(STOP_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        # The second of a preemption, at the end of the grace time.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        assert stop.received == "SIGUSR2"
        with StopRequest() as again:
            assert again.received == "SIGTERM"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_a_mask_that_blocks_nothing_stays_so() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with StopRequest():
        pass
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
