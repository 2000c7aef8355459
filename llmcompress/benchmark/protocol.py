"""The conditions of a measurement of speed: its protocol, stored with the numbers, and the machine: cores, caches, load
and the read bandwidth of its memory."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from llmcompress.errors import RecipeError
from llmcompress.runtime.facts import torch_facts
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.load import usable_cores
from llmcompress.runtime.memory import total_memory

DTYPES = ("bfloat16", "float16", "float32")
SEED = 0  # of the prompt's tokens
WARM_UP = 2  # tokens of the turn that does not count
CPU_TREE = Path("/sys/devices/system/cpu")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
LEAST = 2**30  # bytes of the buffer to read, far more than caches hold
CACHES = 4  # times the last-level cache, if that is more
SHARE = 0.25  # of the free memory, at most
WIDTH = 2**16  # columns; their factors stay in a core's own cache
REPEATS = 3


@dataclass(frozen=True)
class SpeedProtocol(JsonRecord):
    """Work of one turn, and the number of turns. Raises RecipeError for numbers that cannot be measured."""

    threads: tuple[int, ...]
    prompt: int = 512  # tokens read at once
    tokens: int = 32  # generated after the first one
    rounds: int = 5
    dtype: str = "bfloat16"  # of dense models
    plain: bool = False  # True: compressed models run without kernels

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise RecipeError(
                f"threads {','.join(map(str, self.threads)) or 'none'} cannot be measured; give 1 or more, as in 1,2"
            )
        for name, least in (("prompt", 1), ("tokens", 1), ("rounds", 1)):
            if (given := getattr(self, name)) < least:
                raise RecipeError(f"a measurement needs {name} of {least} at least, not {given}; give more")
        if self.dtype not in DTYPES:
            raise RecipeError(f"dense models cannot be loaded in {self.dtype!r}; choose one of {', '.join(DTYPES)}")

    @property
    def context(self) -> int:
        """Positions that a turn takes."""
        return self.prompt + self.tokens + 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        return super().to_json() | {"threads": list(self.threads), "batch_size": 1, "seed": SEED}


def parse_threads(text: str | None, cores: int) -> tuple[int, ...]:
    """Return the numbers in "1,2", each once; for None, one thread and all `cores`. Raises RecipeError."""
    if text is None:
        return (1,) if cores == 1 else (1, cores)
    try:
        counts = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as error:
        raise RecipeError(f"threads {text!r} are not whole numbers; give them as in 1,2") from error
    if min(counts) < 1:
        raise RecipeError(f"threads {text!r} cannot be measured; give 1 or more, as in 1,2")
    return counts


def last_level_cache(tree: Path = CPU_TREE) -> int | None:
    """Return the bytes of all last-level caches together, as the kernel lists them; None where it does not.

    A machine with several sockets has several; each counts once, however many cores share it.
    """
    caches: dict[tuple[int, str], int] = {}
    for folder in tree.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            kind, level, size, shared = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        number = re.fullmatch(r"(\d+)([KMG]?)", size)
        if number and kind in ("Unified", "Data"):
            caches[int(level), shared] = int(number[1]) * UNITS[number[2]]
    last = max((level for level, _ in caches), default=None)
    return None if last is None else sum(size for (level, _), size in caches.items() if level == last)


def machine_facts() -> dict[str, Any]:
    """Return plain values: system, processor and its features, cores, bytes of memory and caches, load average."""
    facts, total = torch_facts(), total_memory()
    return {
        "system": platform.platform(),
        "cpu": facts.cpu or "unknown",
        "flags": list(facts.flags),
        "cores": usable_cores(),
        "memory_bytes": total,
        "available_bytes": min(psutil.virtual_memory().available, total),
        "cache_bytes": last_level_cache(),
        "load_average": os.getloadavg()[0],
    }


def buffer_bytes(cache: int | None, available: int) -> tuple[int, str | None]:
    """Return the bytes of a buffer to read, and a note if memory is too short for one that no cache holds.

    `cache`: bytes of the last level, None where unknown. `available`: bytes of free memory.
    """
    row = 4 * WIDTH
    wanted = max(LEAST, CACHES * (cache or 0))
    size = max(row, min(wanted, int(available * SHARE)) // row * row)
    if size >= wanted // row * row:
        return size, None
    return size, (
        f"read bandwidth was measured on a buffer of {size / 1e6:,.0f} MB, since memory is short; caches may hold a "
        f"part of it, which makes it look higher than it is"
    )


class BandwidthMeter:
    """A buffer of float32 of about `size` bytes; a turn reads it from one end to the other."""

    def __init__(self, size: int) -> None:
        # numpy asks the system for huge pages; the ones are written, so that every page exists
        self.values = torch.from_numpy(np.ones((size // (4 * WIDTH), WIDTH), np.float32))
        self.factors = torch.ones(WIDTH)

    @property
    def bytes(self) -> int:
        """Bytes that one reading takes from memory."""
        return self.values.numel() * self.values.element_size()

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the bandwidth in bytes/s with some threads."""
        torch.set_num_threads(threads)
        return {"threads": torch.get_num_threads(), "bandwidth": self.bandwidth()}

    def bandwidth(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Return bytes/s with torch's current threads: the best of several passes in two access patterns."""
        readings: tuple[Callable[[], object], ...] = (lambda: torch.mv(self.values, self.factors), self.values.sum)
        best = 0.0
        for read in readings * REPEATS:
            start = clock()
            read()
            best = max(best, self.bytes / (clock() - start))
        return best
