"""Limits that a container or a batch system sets: Linux control groups, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes from which version 1 means that there is no limit


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest limits that hold for this process: bytes of memory, and processor time in cores; None for none."""

    memory: int | None = None
    cores: float | None = None


def cgroup_limits(root: Path = ROOT, own: Path = OWN) -> CgroupLimits:
    """Return the limits by the tree at `root` and the file `own` that says where this process is in it."""
    memory = [limit for folder in _folders(root, own, "memory") for limit in _memory(folder)]
    cores = [limit for folder in _folders(root, own, "cpu") for limit in _cores(folder)]
    return CgroupLimits(min(memory, default=None), min(cores, default=None))


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
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
        tree = root / controller if controllers else root
        yield tree
        inner = tree
        for part in Path(path).parts[1:]:
            inner = inner / part
            yield inner


def _memory(folder: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        words = _words(folder / name)
        if words and words[0] != "max" and int(words[0]) < UNLIMITED:
            yield int(words[0])


def _cores(folder: Path) -> Iterator[float]:
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
