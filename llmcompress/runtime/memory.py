"""Memory: the size of it, the peak of a process, and the return of freed pages."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from llmcompress.runtime.cgroup import cgroup_limits

# glibc's mallopt: what each parameter is called in malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
NEVER = -1
# Larger allocations go back at once all the same: kept, they would seldom fit the next ones.
KEPT = ((MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, NEVER), (TOP_PAD, 2**26))
# What glibc comes to by itself once a process has freed 32 MiB at once; where it began cannot be had again.
USUAL = ((MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, 2**26), (TOP_PAD, 2**17))


def trim_memory() -> None:
    """Returns freed memory to the system.

    glibc keeps what lies between long-lived allocations: without this, 24 blocks of 28 MB left 370 MB behind.
    """
    trim = _of_library("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """While it lasts, freed memory, up to 32 MiB a piece, stays with the process to be used again; then it is returned.

    Steps of a training free and allocate the same hundreds of megabytes over and over, and glibc returns them each time
    to take them again page by page, each cleared by the system: a tenth of a step's time on a CPU.
    """
    mallopt = _of_library("mallopt")
    if mallopt is None:
        yield
        return
    for parameter, value in KEPT:
        mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in USUAL:
            mallopt(parameter, value)
        trim_memory()


def _of_library(name: str) -> Any:
    """Return a function of the C library; None if the library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss would start from what the launching process held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory() -> int:
    """Bytes of physical memory, or what the process's control groups may have of it, as in a container."""
    physical = int(psutil.virtual_memory().total)
    allowed = cgroup_limits().memory
    return physical if allowed is None else min(physical, allowed)
