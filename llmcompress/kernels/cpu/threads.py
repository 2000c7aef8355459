"""The threads of torch, which run kernels too: its own OpenMP, so that no thread waits for another pool's.

`torch.set_num_threads` decides how many. Where torch has no GNU OpenMP, and in processes made by `fork`, where its
threads are gone but waited for, kernels run in the thread that calls them.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Team:
    """OpenMP's entry points: `parallel(function, data, threads, flags)`, and the addresses of two questions."""

    parallel: Any
    count: int
    number: int


def team() -> Team | None:
    """Return the OpenMP of torch; None if it has none of GNU's kind, or not in this process."""
    return None if _FORKED else _openmp()


@lru_cache(maxsize=1)
def _openmp() -> Team | None:
    beside = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    for name in (*map(str, beside), None):
        try:
            library = ctypes.CDLL(name)
            parallel = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        count, number = (
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (library.omp_get_num_threads, library.omp_get_thread_num)
        )
        return Team(parallel, count, number)
    return None


_FORKED: list[bool] = []  # not empty in a process that another one forked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(True))
