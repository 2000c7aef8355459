"""Stages of a job: a bar with the time left on a terminal, elsewhere one line each with its seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from llmcompress.reporting.formatting import duration

if TYPE_CHECKING:
    from rich.progress import Progress

HEARTBEAT = 300.0  # seconds between lines of a stage without a bar
Clock = Callable[[], float]


class Stage:
    """One stage, from its construction to `end`.

    Args:
        name: the thing that is counted or done, such as "block" or "load".
        stream: where to show the stage; a terminal gets a bar.
        since: the time of `clock` when the stage began; by default now.
        clock: returns seconds that only grow.
    """

    def __init__(self, name: str, stream: TextIO, *, since: float | None = None, clock: Clock = time.monotonic) -> None:
        self.name, self._stream, self._clock = name, stream, clock
        self.started = clock() if since is None else since
        self._spoke = self.started
        self._first: tuple[int, float] | None = None  # count and time of the first update
        self._label = name
        self._bar: Progress | None = None
        if stream.isatty():
            self._draw(None, None)

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done, and a `note` such as "812 tokens/s"."""
        self._label = f"{self.name} {done}/{total}" + f" · {note}" * bool(note)
        now = self._clock()
        if self._stream.isatty():
            self._draw(done, total, self._label + self._remaining(done, total, now))
        elif done < total and now - self._spoke >= HEARTBEAT:
            self._spoke = now
            self._print(self._label + self._remaining(done, total, now))
        if self._first is None:
            self._first = (done, now)

    def progress(self, done: int, total: int, *_: float) -> None:
        """Update without a note; a callback for `compress` and `distill`."""
        self.update(done, total)

    def end(self, verb: str = "") -> float:
        """Remove the bar and print the stage's line with its seconds. `verb` says how it ended. Returns the time."""
        self.close()
        now = self._clock()
        self._print(f"{self._label} ... {verb}{duration(now - self.started)}")
        return now

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _remaining(self, done: int, total: int, now: float) -> str:
        """Return the time left at the pace since the first update."""
        before, then = self._first or (done, now)
        if done in (before, total):
            return ""
        return f" · {duration((now - then) / (done - before) * (total - done))} left"

    def _draw(self, done: int | None, total: int | None, text: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bar is None:
            console = Console(file=self._stream, highlight=False, markup=False)
            columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.add_task(self.name, total=None)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=text or self.name)

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
