"""The Viterbi algorithm, compiled: the codes of a trellis whose numbers are nearest to those wanted.

The cheapest path to every state is known, and a step extends all of them. States that share all but their oldest code
lead to the same successors, so only the cheapest of these survives. Costs lie so that each loop (`viterbi_numba.py`)
runs along memory: by a state's newest code where codes are few, and otherwise (`WIDE`) in the order of states, in which
all newest codes lie beside each other.

Every machine finds the same path, GPUs too (`viterbi_triton.py`). Sums are rounded as they are written (no `fastmath`,
which gains nothing here). Of equally cheap paths the one with the lowest oldest code survives; of equally cheap ends
the one with the lowest newest code, then the lowest state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from llmcompress.weight.trellis import Trellis, table

WIDE = 5  # bits of a code from which on codes are many
ONCE = Lock()  # held while a search is made: numba confuses two that it loads from one file
Floats = NDArray[np.float32]
States = NDArray[np.int32]
Search = Callable[[Floats, Floats, int, int], States]


def search(trellis: Trellis) -> Search:
    """The function `(wanted, importance, start, end) -> states` for a trellis; other threads run meanwhile.

    `wanted` float32 `[steps, values]`; `importance`, alike, is what a squared error counts. The way begins in the state
    `start` and ends in the state `end`, or in any for -1; its states, int32 `[steps]`, are those after each step.
    """
    find, numbers = compiled(replace(trellis, code="table")), _numbers(trellis)  # one search for all codes
    return lambda wanted, importance, start, end: find(wanted, importance, numbers, start, end)


@lru_cache(maxsize=16)
def _numbers(trellis: Trellis) -> Floats:
    return arranged(trellis, table(trellis).numpy())


def arranged(trellis: Trellis, numbers: Floats) -> Floats:
    """Return numbers `[states, values]` as costs lie: `[values, newest code, the rest of the state]`, or where codes
    are many `[values, the rest, newest code]`."""
    numbers = numbers.reshape(-1, 1 << trellis.bits, trellis.values)
    return np.ascontiguousarray(numbers.transpose((2, 0, 1) if trellis.bits >= WIDE else (2, 1, 0)))


def compiled(trellis: Trellis) -> Callable[[Floats, Floats, Floats, int, int], States]:
    """Return the search for a trellis of these sizes, whatever its code, to be called with numbers as `arranged`."""
    with ONCE:
        return _compiled(trellis.bits, trellis.memory, trellis.values == 2)


@cache
def _compiled(bits: int, memory: int, pairs: bool) -> Callable[..., States]:
    from llmcompress.methods.solvers import viterbi_numba

    return (viterbi_numba.wide if bits >= WIDE else viterbi_numba.narrow)(bits, memory, pairs)
