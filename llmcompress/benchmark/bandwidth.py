"""Read bandwidth of the machine's memory, measured: the bound on the speed of decoding.

Every token reads all weights once, and a batch of one does little else. So tokens/s times the bytes of the weights is a
share of what the memory can give.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

LEAST = 2**30  # bytes: what caches hold of it does not matter
CACHES = 4  # times the last-level cache, if that is more
SHARE = 0.25  # of the free memory, at most
WIDTH = 2**16  # columns; their factors stay in a core's own cache
REPEATS = 3


def buffer_bytes(cache: int | None, available: int) -> tuple[int, str | None]:
    """Return the size of a buffer to read, in bytes, and a remark where memory does not allow one that no cache holds.

    `cache`: of the last level, None where it is unknown. `available`: memory that is free.
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


class ReadBuffer:
    """A buffer of float32 that is read from one end to the other."""

    def __init__(self, size: int) -> None:
        # numpy's, for which the system is asked for huge pages; written, so that every page is there
        self.values = torch.from_numpy(np.ones((size // (4 * WIDTH), WIDTH), np.float32))
        self.factors = torch.ones(WIDTH)

    @property
    def bytes(self) -> int:
        """Bytes that one reading takes from memory."""
        return self.values.numel() * self.values.element_size()

    def bandwidth(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Return bytes/s with torch's threads as they are set: the fastest of a few readings of two kinds."""
        readings: tuple[Callable[[], object], ...] = (lambda: torch.mv(self.values, self.factors), self.values.sum)
        best = 0.0
        for read in readings * REPEATS:
            start = clock()
            read()
            best = max(best, self.bytes / (clock() - start))
        return best
