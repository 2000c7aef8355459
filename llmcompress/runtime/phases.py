"""Seconds of a run by phase, on the host and on a GPU.

    with time_phases() as phases:
        with phase("forward"):
            ...
            with phase("moments"):  # counts here alone
                ...
    phases.seconds()

A phase of a part of the code costs two readings of the clock, nothing where no run is timed. Threads side by side count
each. Seconds on a GPU are those between the first and the last operation of a phase on its stream, waits included; no
phase waits for a GPU, whose marks are read once its work has passed them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_MARKS = 4096  # that wait for a GPU, before it is waited for
_HERE = threading.local()  # `inside`: the phases under way in this thread, the innermost last


@dataclass(eq=False)
class _Open:
    """A phase under way. `inner`: seconds of phases within it; `begins`: its mark on the GPU, None on a CPU."""

    name: str
    started: float
    begins: Any
    inner: float = 0.0


@dataclass(eq=False)
class Phases:
    """Seconds by phase.

    `stage`: begins the names of phases for now. `marks`: on a GPU that may not be reached yet, as (phase, the one
    around it, begin, end).
    """

    stage: str = ""
    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)
    marks: deque[tuple[str, str | None, Any, Any]] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds(self) -> dict[str, dict[str, float]]:
        """Return {host, and device where there is a GPU} of every phase, the longest first. Waits for the GPU."""
        with self.lock:
            self._read_marks(wait=True)
            ranked = sorted(self.host, key=lambda name: -self.host[name])
            return {
                name: {"host": self.host[name]} | ({"device": self.device[name]} if name in self.device else {})
                for name in ranked
            }

    def resume(self, before: Mapping[str, Mapping[str, float]]) -> None:
        """Add what `seconds` returned in an earlier process of the run."""
        with self.lock:
            for name, spent in before.items():
                self.host[name] = self.host.get(name, 0.0) + spent["host"]
                if "device" in spent:
                    self.device[name] = self.device.get(name, 0.0) + spent["device"]

    def add(self, done: _Open, around: _Open | None) -> None:
        """Count a phase that has just ended, within the one `around` it."""
        spent = time.monotonic() - done.started
        if around is not None:
            around.inner += spent
        with self.lock:
            self.host[done.name] = self.host.get(done.name, 0.0) + spent - done.inner
            if done.begins is not None:
                self.marks.append((done.name, None if around is None else around.name, done.begins, _mark()))
                self._read_marks(wait=len(self.marks) > MOST_MARKS)

    def _read_marks(self, wait: bool) -> None:
        while self.marks and (wait or self.marks[0][3].query()):
            name, around, begins, ends = self.marks.popleft()
            ends.synchronize()
            spent = begins.elapsed_time(ends) / 1000
            self.device[name] = self.device.get(name, 0.0) + spent
            if around is not None:
                self.device[around] = self.device.get(around, 0.0) - spent


_timed: list[Phases] = []  # at most one: the run that is timed


@contextmanager
def time_phases(stage: str = "") -> Iterator[Phases]:
    """Time the phases of a run while the context lasts; within another such context, go on with that one's.

    `stage`: of the run, whose phases are told apart by it, as "prices: forward".
    """
    is_outer = not _timed
    if is_outer:
        _timed.append(Phases())
    phases = _timed[0]
    before, phases.stage = phases.stage, f"{stage}: " if stage else phases.stage
    try:
        yield phases
    finally:
        phases.stage = before
        if is_outer:
            _timed.clear()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the seconds of the context as those of the phase `name`, if a run is timed."""
    if not _timed:
        yield
        return
    inside: list[_Open] = _HERE.__dict__.setdefault("inside", [])
    around = inside[-1] if inside else None
    here = _Open(_timed[0].stage + name, time.monotonic(), _mark() if torch.cuda.is_initialized() else None)
    inside.append(here)
    try:
        yield
    finally:
        inside.pop()
        if _timed:
            _timed[0].add(here, around)


def _mark() -> Any:
    """Put a mark on the current stream, at which the GPU notes its time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
