"""Cores that this process may use, and those that other programs take.

Two programs whose threads spin while they wait slow each other down on the same cores: a step of half a millisecond
takes twenty. So speeds are measured, and times promised, for a quiet machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable

import psutil

from llmcompress.runtime.memory import cgroup_limits

MOMENT = 0.25  # seconds of a look
MARGIN = 0.4  # of a core, which any machine uses by itself
SLOW = 3  # times the expected seconds


def usable_cores() -> int:
    """Return the number of cores that this process may use, by affinity and control group."""
    return max(1, min(len(_allowed_cores()), int(cgroup_limits().cores or len(_allowed_cores()))))


class LoadWatch:
    """Measures the cores that other programs take, from one look to the next."""

    def __init__(self) -> None:
        self._idle, self._own, self._since = _idle_seconds(), time.process_time(), time.monotonic()

    def cores_taken(self) -> float:
        """Return how many of this process's cores others used, on average since the last look."""
        idle, own, now = _idle_seconds(), time.process_time(), time.monotonic()
        passed = max(now - self._since, 1e-3)
        free = sum(idle[core] - before for core, before in self._idle.items() if core in idle) / passed
        others = len(idle) - free - (own - self._own) / passed
        self._idle, self._own, self._since = idle, own, now
        return min(max(0.0, others), len(idle))


class SlowBlocks:
    """Tells once if other work slows down a run of similar blocks."""

    def __init__(self) -> None:
        self._watch, self._since, self._silent = LoadWatch(), time.monotonic(), False
        self._fastest: dict[Hashable, float] = {}

    def end_block(self, kind: Hashable) -> str | None:
        """Return a remark if others took half of the cores during a block of some `kind`; None after the first remark.

        A block counts if it is the first, or took SLOW times as long as the fastest of its kind.
        """
        taken, now = self._watch.cores_taken(), time.monotonic()
        seconds, self._since = now - self._since, now
        is_first, fastest = not self._fastest, self._fastest.get(kind, math.inf)
        self._fastest[kind] = min(seconds, fastest)
        if self._silent or taken < len(_allowed_cores()) / 2 or not (is_first or seconds > SLOW * fastest):
            return None
        self._silent = True
        than = "on a quiet one" if is_first else f"they need (this one {seconds:.1f} s, an earlier one {fastest:.1f})"
        return f"{_describe_load(taken)}: blocks take longer than {than}"


def busy_note() -> str | None:
    """Return a remark if other work takes cores of this process during MOMENT seconds; None on a quiet machine."""
    watch = LoadWatch()
    time.sleep(MOMENT)
    taken = watch.cores_taken()
    return None if usable_cores() - (len(_allowed_cores()) - taken) < MARGIN else _describe_load(taken)


def _describe_load(taken: float) -> str:
    return f"this machine is busy (other work takes {taken:.1f} of {len(_allowed_cores())} cores)"


def _allowed_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def _idle_seconds() -> dict[int, float]:
    """Return the seconds since the start of the machine in which each core was idle or waited for a disk."""
    times = psutil.cpu_times(percpu=True)
    return {
        core: times[core].idle + getattr(times[core], "iowait", 0.0) for core in _allowed_cores() if core < len(times)
    }
