"""The machine that a speed was measured on: cores, caches, load."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil

from llmcompress.runtime.load import usable_cores
from llmcompress.runtime.memory import total_memory

CPU_TREE = Path("/sys/devices/system/cpu")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def last_level_cache(tree: Path = CPU_TREE) -> int | None:
    """Return the bytes of the largest caches of all kinds together, as the kernel lists them; None where it does not.

    A machine with several sockets has several; each counts once, however many cores share it.
    """
    found: dict[tuple[int, str], int] = {}
    for folder in tree.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            kind, level, size, shared = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        number = re.fullmatch(r"(\d+)([KMG]?)", size)
        if number and kind in ("Unified", "Data"):
            found[int(level), shared] = int(number[1]) * UNITS[number[2]]
    last = max((level for level, _ in found), default=None)
    return None if last is None else sum(size for (level, _), size in found.items() if level == last)


def machine_facts() -> dict[str, Any]:
    """Return plain values: system, processor with what it can do, cores, bytes of memory and caches, load average."""
    from llmcompress.runtime.facts import torch_facts

    torch = torch_facts()
    total = total_memory()
    return {
        "system": platform.platform(),
        "cpu": torch.cpu or "unknown",
        "flags": list(torch.flags),
        "cores": usable_cores(),
        "memory_bytes": total,
        "available_bytes": min(psutil.virtual_memory().available, total),
        "cache_bytes": last_level_cache(),
        "load_average": os.getloadavg()[0],
    }
