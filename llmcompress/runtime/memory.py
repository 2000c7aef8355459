"""Memory of a process: limits of the machine and its control groups, the peak, and the return of freed pages."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes from which version 1 of control groups means no limit

# glibc's mallopt: the numbers of its parameters in malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
NEVER = -1
# Larger allocations still go back at once: kept, they would seldom fit the next ones.
KEEPING = ((MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, NEVER), (TOP_PAD, 2**26))
# The values that glibc reaches once a process has freed 32 MiB at once; its initial ones cannot be restored.
USUAL = ((MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, 2**26), (TOP_PAD, 2**17))


def trim_memory() -> None:
    """Return freed memory to the system; glibc keeps what lies between long-lived allocations, 370 MB of 24 blocks."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let the process keep freed memory, up to 32 MiB a piece, while the context lasts; return it afterwards.

    Training steps free and allocate the same hundreds of megabytes, which glibc would return and take back page by
    page: a tenth of a step's time on a CPU.
    """
    mallopt = _c_function("mallopt")
    if mallopt is None:
        yield
        return
    for parameter, value in KEEPING:
        mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in USUAL:
            mallopt(parameter, value)
        trim_memory()


def _c_function(name: str) -> Any:
    """Return a function of the C library; None if the library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss would start from the memory of the launching process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory() -> int:
    """Return the bytes of physical memory, or the smaller limit of the control groups, as in a container."""
    physical = int(psutil.virtual_memory().total)
    limit = cgroup_limits().memory
    return physical if limit is None else min(physical, limit)


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest limits of a process: bytes of memory, and processor time in cores; None for no limit."""

    memory: int | None = None
    cores: float | None = None


def cgroup_limits(root: Path = GROUPS, own: Path = OWN_GROUPS) -> CgroupLimits:
    """Return the limits that a container or a batch system sets by control groups, versions 1 and 2.

    `own`: the file that says where this process is in the tree at `root`.
    """
    memory = [limit for folder in _cgroup_folders(root, own, "memory") for limit in _memory_limits(folder)]
    cores = [limit for folder in _cgroup_folders(root, own, "cpu") for limit in _core_limits(folder)]
    return CgroupLimits(min(memory, default=None), min(cores, default=None))


def _cgroup_folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders whose limits hold: the process's group and all groups around it, of both versions.

    A container often sees its own group as the root of the tree, whatever path `own` has; so the root is always one.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / controller if controllers else root
        yield folder
        for part in Path(path).parts[1:]:
            folder = folder / part
            yield folder


def _memory_limits(folder: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        words = _words(folder / name)
        if words and words[0] != "max" and int(words[0]) < UNLIMITED:
            yield int(words[0])


def _core_limits(folder: Path) -> Iterator[float]:
    quota = _words(folder / "cpu.max")  # "200000 100000": microseconds of each period
    if not quota:
        quota = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
    if len(quota) == 2 and quota[0] not in ("max", "-1"):
        yield int(quota[0]) / int(quota[1])


def _words(path: Path) -> list[str]:
    """Return the words of a file; none where it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []
