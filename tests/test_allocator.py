"""Freed memory stays with the process while it is asked to, and no longer."""

from __future__ import annotations

import ctypes
import sys

import psutil
import pytest
import torch

from llmcompress.allocator import keeping_freed_memory

MEGABYTE = 10**6
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc, whose rules are changed"
)


def left_behind() -> int:
    """Bytes that a freed tensor of 256 MB left with the process."""
    process = psutil.Process()
    before = process.memory_info().rss
    torch.ones(64 * MEGABYTE)
    left: int = process.memory_info().rss - before
    return left


def test_freed_memory_stays_meanwhile_alone() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with pytest.raises(KeyError), keeping_freed_memory():
        assert left_behind() > 200 * MEGABYTE
        assert left_behind() < 50 * MEGABYTE, "what was freed was not used again"
        raise KeyError
    assert process.memory_info().rss - before < 50 * MEGABYTE
    assert left_behind() < 50 * MEGABYTE
