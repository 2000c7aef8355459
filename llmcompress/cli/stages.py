"""Stages of a job: a bar with the time left on a terminal, elsewhere a line a minute and one at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from llmcompress.reporting.formatting import duration

if TYPE_CHECKING:
    from rich.progress import Progress

HEARTBEAT = 60.0  # seconds between lines of a stage without a bar
SHORT = 10.0  # seconds: less is not worth a line of its own
TICK = 1.0  # seconds between two looks at the clock
MANY = 10_000  # steps: a share is shown in place of so many
Clock = Callable[[], float]


@dataclass(frozen=True)
class _Count:
    """Steps of one kind: `done` at the time `now`, after the `first` (steps, time) that was known."""

    name: str
    first: tuple[int, float]
    done: int
    total: int
    now: float

    @property
    def text(self) -> str:
        """The name with the number of steps, or the share of many."""
        if self.total >= MANY:
            return f"{self.name} {self.done / self.total:.0%}"
        return f"{self.name} {self.done}/{self.total}"

    def remaining(self, now: float) -> str:
        """Return a clause on the time left at the pace since the first count, if that is known and not over."""
        before, then = self.first
        if self.done in (before, self.total):
            return ""
        left = (self.now - then) / (self.done - before) * (self.total - self.done) - (now - self.now)
        return f" · {duration(left)} left" if left > 0 else ""


class Stage:
    """One stage, from its construction to `end`.

    Args:
        name: the thing that is counted or done, such as "block" or "load".
        stream: where to show the stage; a terminal gets a bar.
        since: the time of `clock` when the stage began; by default now.
        clock: returns seconds that only grow; by default those of the machine.
        loud: False for a stage that is shown only if it is not short.
    """

    def __init__(
        self, name: str, stream: TextIO, *, since: float | None = None, clock: Clock | None = None, loud: bool = True
    ) -> None:
        self.name, self.loud, self._stream, self._clock = name, loud, stream, clock or time.monotonic
        self.started = self._clock() if since is None else since
        self.spoke = self.started  # when a line was printed last
        self._note = ""
        self._counts: dict[str, _Count] = {}  # of the stage, and of the parts under way
        self._bar: Progress | None = None
        if loud and stream.isatty():
            self.beat()

    def update(self, done: int, total: int, note: str = "", part: str | None = None) -> None:
        """Show that `done` of `total` are done, and a `note` such as "812 tokens/s"; or those of a `part` by its name.

        A part is over after the last one, and with each one of the stage.
        """
        name, now = part or self.name, self._clock()
        if part is None:
            self._note = f" · {note}" * bool(note)
            self._counts = {key: count for key, count in self._counts.items() if key == name}
        known = self._counts.pop(name, None)
        if part is None or done < total or not total:
            first = (done, now) if known is None or done < known.done else known.first
            self._counts[name] = _Count(name, first, done, total, now)
        if part is not None or done < total or self._stream.isatty():
            self.beat()

    def progress(self, done: int, total: int, *_: float) -> None:
        """Update without a note; a callback for `compress` and `distill`."""
        self.update(done, total)

    def beat(self) -> None:
        """Redraw the bar, or print a line if the last one is a minute old."""
        now = self._clock()
        spent = now - self.started
        if self._stream.isatty():
            if self.loud or spent >= TICK:
                self._draw(self._line(now))
        elif now - self.spoke >= HEARTBEAT:
            line = self._line(now)
            self._print(line if " left" in line or spent < TICK else f"{line} · {duration(spent)} so far")

    def end(self, verb: str = "") -> float | None:
        """Remove the bar and print the stage's line with its seconds; `verb` says how it ended.

        Returns the time, or None if the stage was not worth a line.
        """
        self.close()
        now = self._clock()
        if not self.loud and now - self.started < SHORT:
            return None
        self._print(f"{self._label()} ... {verb}{duration(now - self.started)}")
        return now

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _label(self) -> str:
        return (self._counts[self.name].text if self.name in self._counts else self.name) + self._note

    def _line(self, now: float) -> str:
        """Return the stage and its parts as they stand, with the times left that are known."""
        left = self._counts[self.name].remaining(now) if self.name in self._counts else ""
        parts = [f" · {part.text}{part.remaining(now)}" for part in self._counts.values() if part.name != self.name]
        return self._label() + left + "".join(parts)

    def _draw(self, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bar is None:
            console = Console(file=self._stream, highlight=False, markup=False)
            columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.add_task(self.name, total=None)
            self._bar.start()
        own = self._counts.get(self.name)
        done, total = (None, None) if own is None or own.total < 2 else (own.done, own.total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=text)

    def _print(self, line: str) -> None:
        self.spoke = self._clock()
        self._stream.write(line + "\n")
        self._stream.flush()


@contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` every second, from a thread of its own, while the context lasts."""
    over = threading.Event()

    def run() -> None:
        with suppress(OSError):  # the command's own next line meets it too
            while not over.wait(TICK):
                beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(TICK)
