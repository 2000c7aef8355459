"""Freed memory stays with the process while it is asked to, and no longer."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from multiprocessing import get_context

import psutil
import pytest

from llmcompress.runtime.memory import keeping_freed_memory

MEGABYTE = 10**6
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc, whose rules are changed"
)


def left_behind() -> int:
    """Bytes that 16 pieces of 16 MB left with the process when they were freed, the last one first."""
    library, process = ctypes.CDLL(None), psutil.Process()
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    before = process.memory_info().rss
    pieces = [library.malloc(16 * MEGABYTE) for _ in range(16)]
    for piece in pieces:
        ctypes.memset(piece, 1, 16 * MEGABYTE)
    for piece in reversed(pieces):
        library.free(piece)
    left: int = process.memory_info().rss - before
    return left


def measured() -> list[int]:
    """Return the bytes left behind the first and the second time, those left in the end, and those of the next time."""
    before = psutil.Process().memory_info().rss
    left: list[int] = []
    with suppress(KeyError), keeping_freed_memory():
        left += [left_behind(), left_behind()]
        raise KeyError
    return [*left, psutil.Process().memory_info().rss - before, left_behind()]


def test_freed_memory_stays_within_the_context_alone() -> None:
    with get_context("spawn").Pool(1) as fresh:
        first, second, ended, after = fresh.apply(measured)
    assert first > 200 * MEGABYTE, "it was returned at once"
    assert second < 50 * MEGABYTE, "what was freed was not used again"
    assert ended < 50 * MEGABYTE, "it was not returned in the end"
    assert after < 100 * MEGABYTE, "other work keeps what it frees"
