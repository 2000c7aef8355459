"""Which codes of a trellis stand for numbers nearest to those wanted: the Viterbi algorithm, compiled.

Of every state the cheapest way to it is known; a step extends all of them. States that share all but their oldest code
lead to the same successors, so of these only the cheapest goes on. Costs lie by a state's newest code, so that each
loop below runs along memory. Sums are rounded as they are written (no `fastmath`, which gains nothing here), and of
equally cheap ways the one with the lowest oldest code goes on: every machine finds the same, GPUs
too (`viterbi_triton.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcompress.trellis import Trellis, table

FAR = np.float32(2e30)  # the cost, at first, of states that no way leads to
UNREACHED = np.float32(1e30)  # costs from here on
TWICE = np.float32(-2)  # a plain number would make the arithmetic float64
Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
States = NDArray[np.int32]
Search = Callable[[Floats, Floats, int, int], States]


def search(trellis: Trellis) -> Search:
    """The function `(wanted, importance, start, end) -> states` for a trellis; other threads run meanwhile.

    `wanted` float32 `[steps, values]`; `importance`, alike, is what a squared error counts. The way begins in the state
    `start` and ends in the state `end`, or in any for -1; its states, int32 `[steps]`, are those after each step.
    """
    find, numbers = _compiled(trellis), _by_newest_code(trellis)
    return lambda wanted, importance, start, end: find(wanted, importance, numbers, start, end)


@lru_cache(maxsize=16)
def _by_newest_code(trellis: Trellis) -> Floats:
    """The table as `[values, newest code, the rest of the state]`."""
    numbers = table(trellis).numpy().reshape(-1, 1 << trellis.bits, trellis.values)
    return np.ascontiguousarray(numbers.transpose(2, 1, 0))


@lru_cache(maxsize=16)
def _compiled(trellis: Trellis) -> Callable[..., Any]:
    from numba import njit  # takes half a second, which only those who search should wait for

    bits, memory = trellis.bits, trellis.memory
    parts, rest, inner = _sizes(trellis)
    cheapest, interleave, extend = _step(trellis)

    @njit(nogil=True)
    def find(wanted: Floats, importance: Floats, numbers: Floats, start: int, end: int) -> States:
        steps = len(wanted)
        states = np.empty(steps, np.int32)
        costs = np.full((parts, rest), FAR)
        costs[start & (parts - 1), start >> bits] = 0
        best, ordered = np.empty((parts, inner), np.float32), np.empty(rest, np.float32)
        oldest = np.empty((steps, parts, inner), np.uint8)
        for step in range(steps):
            cheapest(costs, best, oldest[step])
            interleave(best, ordered)
            extend(ordered, numbers, wanted[step], importance[step], costs)
        place = costs.argmin()
        state = np.int64(end if end >= 0 else (place % rest) << bits | place // rest)
        for step in range(steps - 1, -1, -1):
            states[step] = state
            later = state >> bits
            state = np.int64(oldest[step, later & (parts - 1), later >> bits]) << (memory - bits) | later
        return states

    compiled: Callable[..., Any] = find
    return compiled


def _step(trellis: Trellis) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """The parts of a step, each a loop that a compiler turns into vectors; sizes are constants to it."""
    from numba import njit

    parts, rest, inner = _sizes(trellis)
    pairs = trellis.values == 2

    @njit(nogil=True)
    def cheapest(costs: Floats, best: Floats, oldest: Codes) -> None:
        for newest in range(parts):
            for middle in range(inner):
                low, chosen = costs[newest, middle], np.uint8(0)
                for old in range(1, parts):
                    cost = costs[newest, old * inner + middle]
                    chosen = np.uint8(old) if cost < low else chosen
                    low = min(cost, low)
                best[newest, middle] = low
                oldest[newest, middle] = chosen

    @njit(nogil=True)
    def interleave(best: Floats, ordered: Floats) -> None:
        for middle in range(inner):
            for newest in range(parts):
                ordered[middle * parts + newest] = best[newest, middle]

    @njit(nogil=True)
    def extend(ordered: Floats, numbers: Floats, wanted: Floats, importance: Floats, costs: Floats) -> None:
        base = ordered[0] if ordered[0] < UNREACHED else np.float32(0)  # or costs grow until they are rounded
        slope, weight = TWICE * wanted[0] * importance[0], importance[0]
        for newest in range(parts):
            for state in range(rest):
                number = numbers[0, newest, state]
                costs[newest, state] = ordered[state] - base + number * (slope + weight * number)
        if pairs:
            slope, weight = TWICE * wanted[1] * importance[1], importance[1]
            for newest in range(parts):
                for state in range(rest):
                    number = numbers[1, newest, state]
                    costs[newest, state] += number * (slope + weight * number)

    return cheapest, interleave, extend


def _sizes(trellis: Trellis) -> tuple[int, int, int]:
    """How many codes there are, how many states but for one of their codes, and but for both ends."""
    return 1 << trellis.bits, 1 << (trellis.memory - trellis.bits), 1 << (trellis.memory - 2 * trellis.bits)
