"""Ctrl-C and SIGTERM while a command runs.

A signal raises an exception wherever the program is. A callback of a library may drop it, and a clean-up may turn it
into another error. So the request is remembered: the next report of progress raises it again, and it decides how the
command ends.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from llmcompress.errors import Termination

STOPS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Termination}
EARLY = b"[130] stopped from the keyboard; nothing was left behind\n"


class StopRequests:
    """The requests to stop that a command has received, from `install` to `restore`."""

    def __init__(self) -> None:
        self._request: type[BaseException] | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals, in the main thread; no other thread receives them."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._stop) for number in STOPS}

    def restore(self) -> None:
        """Give the signals back to their handlers; `stop_early` stays off, so the command keeps its exit code."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler is stop_early else handler)
        self._previous = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._request = STOPS[number]
        raise self._request

    def check(self) -> None:
        """Raise a request whose exception was dropped."""
        if self._request is not None:
            raise self._request

    def decide(self, error: BaseException | None) -> BaseException | None:
        """Return the exception that a command ends with: the request if there was one and an error, else the error."""
        if error is None or self._request is None or isinstance(error, tuple(STOPS.values())):
            return error
        stop = self._request()
        for note in getattr(error, "__notes__", ()):
            stop.add_note(note)
        return stop


def stop_early(number: int, frame: FrameType | None) -> None:
    """End the program with one sentence while it still imports, before a command runs.

    At once: an exception in the middle of an import can be dropped, or turned into another one.
    """
    os.write(2, EARLY)
    os._exit(130)
