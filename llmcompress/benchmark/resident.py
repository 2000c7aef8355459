"""Memory that this process holds: now, and at most since a moment."""

from __future__ import annotations

from pathlib import Path

import psutil

from llmcompress.runtime.memory import peak_memory

CLEAR = Path("/proc/self/clear_refs")
PEAK = "5"  # what to write there to let the peak begin at what is held now


def resident_memory() -> int:
    """Return the bytes in memory, pages of files included."""
    return int(psutil.Process().memory_info().rss)


def restart_peak() -> bool:
    """Let the peak of this process begin at what it holds now. False where the system does not let it."""
    try:
        CLEAR.write_text(PEAK)
    except OSError:
        return False
    return peak_memory() <= 1.1 * resident_memory()  # else the kernel took the word and did nothing
