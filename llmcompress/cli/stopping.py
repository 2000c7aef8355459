"""Ctrl-C and SIGTERM while a command runs: never lost, and never taken for another error.

A signal raises where the program happens to be. That can be in a callback of a library, which drops every exception, or
in its clean-up, which makes another one of it. So the request is remembered: it is raised again at the next report of
progress, and it decides how the command ends.
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


class Stops:
    """The requests to stop that a command has received, from `install` to `restore`."""

    def __init__(self) -> None:
        self._asked: type[BaseException] | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals, in the main thread, which alone receives them."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._stop) for number in STOPS}

    def restore(self) -> None:
        """Give the signals back to those who had them; a program whose command is over ends as the command did."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler is stop_early else handler)
        self._previous = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._asked = STOPS[number]
        raise self._asked

    def check(self) -> None:
        """Raise a request that something has dropped."""
        if self._asked is not None:
            raise self._asked

    def decide(self, error: BaseException | None) -> BaseException | None:
        """Return what a command ends with: the request, if an error came of it; else the `error`."""
        if error is None or self._asked is None or isinstance(error, tuple(STOPS.values())):
            return error
        stop = self._asked()
        for note in getattr(error, "__notes__", ()):
            stop.add_note(note)
        return stop


def stop_early(number: int, frame: FrameType | None) -> None:
    """End a program that has not begun with its command in one sentence.

    At once, since an exception in the middle of an import can be dropped or be made into another one.
    """
    os.write(2, EARLY)
    os._exit(130)
