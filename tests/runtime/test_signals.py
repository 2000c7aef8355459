"""Requests to stop: held back, not lost."""

from __future__ import annotations

import os
import signal

import pytest

from llmcompress.runtime.signals import STOPPING, stop_requests


@pytest.fixture(autouse=True)
def handlers() -> object:
    """Handlers that raise, as those of a command do; those before come back."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_a_request_waits_for_the_end(number: int) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), stop_requests() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        reached = True
    assert reached and signal.getsignal(number) is signal.default_int_handler


def test_a_second_request_does_not_wait() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), stop_requests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert not reached


def test_an_error_inside_stays_that_error() -> None:
    with pytest.raises(ZeroDivisionError), stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
