"""The cores that other programs use at this moment: beside them, speeds say nothing.

Two programs whose threads wait for each other by spinning stop each other on the same cores: a step of half a
millisecond takes twenty. So speeds are measured, and times promised, for a quiet machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable

import psutil

from llmcompress.runtime.cgroup import cgroup_limits

MOMENT = 0.25  # seconds of looking
MARGIN = 0.4  # of a core: what any machine does beside
SLOW = 3  # times as long as it should


def usable_cores() -> int:
    """Return the number of cores that this process may use, by affinity and control group."""
    return max(1, min(len(_allowed()), int(cgroup_limits().cores or len(_allowed()))))


class LoadWatch:
    """Tells what other programs take, from one look to the next."""

    def __init__(self) -> None:
        self._idle, self._own, self._since = _idle(), time.process_time(), time.monotonic()

    def taken(self) -> float:
        """Return how many of the cores that this process may use others used, on average since the last look."""
        idle, own, now = _idle(), time.process_time(), time.monotonic()
        passed = max(now - self._since, 1e-3)
        free = sum(idle[core] - before for core, before in self._idle.items() if core in idle) / passed
        found = len(idle) - free - (own - self._own) / passed
        self._idle, self._own, self._since = idle, own, now
        return min(max(0.0, found), len(idle))


class SlowBlocks:
    """Notices, once, that other work slows down a run whose blocks are alike."""

    def __init__(self) -> None:
        self._watch, self._since, self._silent = LoadWatch(), time.monotonic(), False
        self._fastest: dict[Hashable, float] = {}

    def ended(self, kind: Hashable) -> str | None:
        """Return a remark at the end of a block of some `kind`, if others took half of the cores: at the first block,
        and where it took SLOW times as long as the fastest of its kind. None otherwise, and after the first remark."""
        taken, now = self._watch.taken(), time.monotonic()
        seconds, self._since = now - self._since, now
        is_first, fastest = not self._fastest, self._fastest.get(kind, math.inf)
        self._fastest[kind] = min(seconds, fastest)
        if self._silent or taken < len(_allowed()) / 2 or not (is_first or seconds > SLOW * fastest):
            return None
        self._silent = True
        than = "on a quiet one" if is_first else f"they need (this one {seconds:.1f} s, an earlier one {fastest:.1f})"
        return f"{_said(taken)}: blocks take longer than {than}"


def busy_note() -> str | None:
    """Return the remark on a machine where other work takes cores that this process has threads for, as a look of
    MOMENT seconds tells; None on a quiet one."""
    watch = LoadWatch()
    time.sleep(MOMENT)
    taken = watch.taken()
    return None if usable_cores() - (len(_allowed()) - taken) < MARGIN else _said(taken)


def _said(taken: float) -> str:
    return f"this machine is busy (other work takes {taken:.1f} of {len(_allowed())} cores)"


def _allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def _idle() -> dict[int, float]:
    """Return the seconds that each core has been idle, or has waited for a disk, since the machine started."""
    times = psutil.cpu_times(percpu=True)
    return {core: times[core].idle + getattr(times[core], "iowait", 0.0) for core in _allowed() if core < len(times)}
