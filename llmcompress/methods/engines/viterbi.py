"""The Viterbi algorithm, compiled: the codes of a trellis whose numbers are nearest to those wanted.

The cheapest path to every state is known, and a step extends all of them. States that share all but their oldest code
lead to the same successors, so only the cheapest of these survives. Costs lie so that each loop below runs along
memory: by a state's newest code where codes are few, and otherwise (`WIDE`) in the order of states, in which all newest
codes lie beside each other.

Every machine finds the same path, GPUs too (`viterbi_triton.py`). Sums are rounded as they are written (no `fastmath`,
which gains nothing here). Of equally cheap paths the one with the lowest oldest code survives; of equally cheap ends
the one with the lowest newest code, then the lowest state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcompress.weight.trellis import Trellis, table

FAR = np.float32(2e30)  # the cost, at first, of states that no way leads to
UNREACHED = np.float32(1e30)  # costs from here on
WIDE = 5  # bits of a code from which on codes are many
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


@lru_cache(maxsize=16)
def compiled(trellis: Trellis) -> Callable[..., Any]:
    """Return the search for a trellis of these sizes, whatever its code, to be called with numbers as `arranged`."""
    from numba import njit  # takes half a second, which only those who search should wait for

    bits, memory = trellis.bits, trellis.memory
    parts, rest, inner = _sizes(trellis)
    wide = bits >= WIDE
    forward = _wide(trellis) if wide else _narrow(trellis)

    @njit(nogil=True)
    def place(state: int) -> int:
        return state if wide else (state & (parts - 1)) * rest + (state >> bits)

    @njit(nogil=True)
    def cheapest_end(costs: Floats) -> int:
        low = costs.min()
        for newest in range(parts):
            for other in range(rest):
                state = other << bits | newest
                if costs[place(state)] == low:
                    return state
        return 0

    @njit(nogil=True)
    def find(wanted: Floats, importance: Floats, numbers: Floats, start: int, end: int) -> States:
        states = np.empty(len(wanted), np.int32)
        costs, oldest = forward(wanted, importance, numbers, start)
        state = np.int64(end if end >= 0 else cheapest_end(costs))
        for step in range(len(wanted) - 1, -1, -1):
            states[step] = state
            later = state >> bits
            entry = later if wide else (later & (parts - 1)) * inner + (later >> bits)
            state = np.int64(oldest[step, entry]) << (memory - bits) | later
        return states

    fast: Callable[..., Any] = find
    return fast


def _narrow(trellis: Trellis) -> Callable[..., Any]:
    """All steps with costs `[newest code, rest]`: those at the end, and at every step the oldest code of the cheapest
    way to `[newest code, middle]`. Its parts are loops that a compiler turns into vectors, with sizes as constants."""
    from numba import njit

    bits, extend = trellis.bits, _extension(trellis)
    parts, rest, inner = _sizes(trellis)

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
    def forward(wanted: Floats, importance: Floats, numbers: Floats, start: int) -> tuple[Floats, Codes]:
        costs = np.full((parts, rest), FAR)
        costs[start & (parts - 1), start >> bits] = 0
        best, ordered = np.empty((parts, inner), np.float32), np.empty(rest, np.float32)
        oldest = np.empty((len(wanted), parts, inner), np.uint8)
        for step in range(len(wanted)):
            cheapest(costs, best, oldest[step])
            interleave(best, ordered)
            extend(ordered, numbers, wanted[step], importance[step], costs)
        return costs.ravel(), oldest.reshape(len(wanted), rest)

    compiled: Callable[..., Any] = forward
    return compiled


def _wide(trellis: Trellis) -> Callable[..., Any]:
    """All steps with costs in the order of states, likewise; oldest codes `[middle, newest code]`."""
    from numba import njit

    extend = _extension(trellis)
    parts, rest, _ = _sizes(trellis)

    @njit(nogil=True)
    def cheapest(costs: Floats, ordered: Floats, oldest: Codes) -> None:
        for state in range(rest):
            ordered[state], oldest[state] = costs[0, state], 0
        for old in range(1, parts):
            for state in range(rest):
                cost = costs[old, state]
                oldest[state] = old if cost < ordered[state] else oldest[state]
                ordered[state] = min(cost, ordered[state])

    @njit(nogil=True)
    def forward(wanted: Floats, importance: Floats, numbers: Floats, start: int) -> tuple[Floats, Codes]:
        costs = np.full(parts * rest, FAR)
        costs[start] = 0
        by_oldest, by_newest = costs.reshape(parts, rest), costs.reshape(rest, parts)
        ordered, oldest = np.empty(rest, np.float32), np.empty((len(wanted), rest), np.uint8)
        for step in range(len(wanted)):
            cheapest(by_oldest, ordered, oldest[step])
            extend(ordered, numbers, wanted[step], importance[step], by_newest)
        return costs, oldest

    compiled: Callable[..., Any] = forward
    return compiled


def _extension(trellis: Trellis) -> Callable[..., None]:
    """The costs of all states, from those of what each continues, `ordered [rest]`."""
    from numba import njit

    pairs, wide = trellis.values == 2, trellis.bits >= WIDE
    parts, rest, _ = _sizes(trellis)
    rows, columns = (rest, parts) if wide else (parts, rest)

    @njit(nogil=True)
    def extend(ordered: Floats, numbers: Floats, wanted: Floats, importance: Floats, costs: Floats) -> None:
        base = ordered[0] if ordered[0] < UNREACHED else np.float32(0)  # or costs grow until they are rounded
        last = len(wanted) - 1  # 0 or 1
        slope, weight = TWICE * wanted[0] * importance[0], importance[0]
        slope_2, weight_2 = TWICE * wanted[last] * importance[last], importance[last]
        for row in range(rows):
            for column in range(columns):
                number = numbers[0, row, column]
                cost = ordered[row if wide else column] - base + number * (slope + weight * number)
                if pairs:
                    number = numbers[1, row, column]
                    cost += number * (slope_2 + weight_2 * number)
                costs[row, column] = cost

    compiled: Callable[..., None] = extend
    return compiled


def _sizes(trellis: Trellis) -> tuple[int, int, int]:
    """Return the number of codes, of states without one of their codes, and of states without both end codes."""
    return 1 << trellis.bits, 1 << (trellis.memory - trellis.bits), 1 << (trellis.memory - 2 * trellis.bits)
