"""The Viterbi algorithm of `viterbi.py` for numba, which takes half a second to import: only those who search wait.

Compiled code is kept on disk for the next process, beside this file or where numba keeps it for a user. That needs
functions that close over plain numbers alone, so the parts below are put into them before they are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

FAR = np.float32(2e30)  # the cost, at first, of states that no way leads to
UNREACHED = np.float32(1e30)  # costs from here on
TWICE = np.float32(-2)  # a plain number would make the arithmetic float64
Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
States = NDArray[np.int32]
F = TypeVar("F", bound=Callable[..., Any])


def _part(function: F) -> F:
    """A function that is put where it is called, so that sizes are constants in it."""
    made: Any = njit(inline="always")(function)
    return cast("F", made)


def _kept(function: F, *sizes: int) -> F:
    """A function that runs beside other threads, and is compiled once for all processes if a folder can be written."""
    # numba finds machine code by this name, and counts functions of one name anew in every process
    function.__qualname__ = function.__name__ = "_".join(["find", *map(str, sizes)])
    try:
        made: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # none can
        made = njit(nogil=True)(function)
    return cast("F", made)


def narrow(bits: int, memory: int, pairs: bool) -> Callable[..., States]:
    """Compile a search whose costs lie as `[newest code, the rest of the state]`."""
    parts, rest, inner = 1 << bits, 1 << (memory - bits), 1 << (memory - 2 * bits)

    def find(wanted: Floats, importance: Floats, numbers: Floats, start: int, end: int) -> States:
        costs = np.full((parts, rest), FAR)
        costs[start & (parts - 1), start >> bits] = 0
        best, ordered = np.empty((parts, inner), np.float32), np.empty(rest, np.float32)
        oldest = np.empty((len(wanted), parts, inner), np.uint8)
        for step in range(len(wanted)):
            _cheapest_narrow(costs, best, oldest[step], parts, inner)
            _interleave(best, ordered, parts, inner)
            _extend_narrow(ordered, numbers, wanted[step], importance[step], costs, parts, rest, pairs)
        state = np.int64(end)
        if end < 0:
            low, ends = costs.min(), costs.ravel()
            for place in range(parts * rest - 1, -1, -1):  # of equals, the first is met last
                if ends[place] == low:
                    state = np.int64(place % rest << bits | place // rest)
        states = np.empty(len(wanted), np.int32)
        for step in range(len(wanted) - 1, -1, -1):
            states[step] = state
            later = state >> bits
            state = np.int64(oldest[step, later & (parts - 1), later >> bits]) << (memory - bits) | later
        return states

    return _kept(find, bits, memory, pairs)


def wide(bits: int, memory: int, pairs: bool) -> Callable[..., States]:
    """Compile a search whose costs lie in the order of states, and oldest codes as `[middle, newest code]`."""
    parts, rest = 1 << bits, 1 << (memory - bits)

    def find(wanted: Floats, importance: Floats, numbers: Floats, start: int, end: int) -> States:
        costs = np.full((rest, parts), FAR)
        costs[start >> bits, start & (parts - 1)] = 0
        ordered, oldest = np.empty(rest, np.float32), np.empty((len(wanted), rest), np.uint8)
        for step in range(len(wanted)):
            _cheapest_wide(costs.reshape(parts, rest), ordered, oldest[step], parts, rest)
            _extend_wide(ordered, numbers, wanted[step], importance[step], costs, parts, rest, pairs)
        state = np.int64(end)
        if end < 0:
            low, ends = costs.min(), costs.T
            for place in range(parts * rest - 1, -1, -1):
                if ends[place // rest, place % rest] == low:
                    state = np.int64(place % rest << bits | place // rest)
        states = np.empty(len(wanted), np.int32)
        for step in range(len(wanted) - 1, -1, -1):
            states[step] = state
            later = state >> bits
            state = np.int64(oldest[step, later]) << (memory - bits) | later
        return states

    return _kept(find, bits, memory, pairs)


# Loops that a compiler turns into vectors.


@_part
def _cheapest_narrow(costs: Floats, best: Floats, oldest: Codes, parts: int, inner: int) -> None:
    for newest in range(parts):
        for middle in range(inner):
            low, chosen = costs[newest, middle], np.uint8(0)
            for old in range(1, parts):
                cost = costs[newest, old * inner + middle]
                chosen = np.uint8(old) if cost < low else chosen
                low = min(cost, low)
            best[newest, middle] = low
            oldest[newest, middle] = chosen


@_part
def _interleave(best: Floats, ordered: Floats, parts: int, inner: int) -> None:
    for middle in range(inner):
        for newest in range(parts):
            ordered[middle * parts + newest] = best[newest, middle]


@_part
def _cheapest_wide(costs: Floats, ordered: Floats, oldest: Codes, parts: int, rest: int) -> None:
    for state in range(rest):
        ordered[state], oldest[state] = costs[0, state], 0
    for old in range(1, parts):
        for state in range(rest):
            cost = costs[old, state]
            oldest[state] = old if cost < ordered[state] else oldest[state]
            ordered[state] = min(cost, ordered[state])


@_part
def _extend_narrow(
    ordered: Floats,
    numbers: Floats,
    wanted: Floats,
    importance: Floats,
    costs: Floats,
    parts: int,
    rest: int,
    pairs: bool,
) -> None:
    base = ordered[0] if ordered[0] < UNREACHED else np.float32(0)  # or costs grow until they are rounded
    last = len(wanted) - 1  # 0 or 1
    slope, weight = TWICE * wanted[0] * importance[0], importance[0]
    slope_2, weight_2 = TWICE * wanted[last] * importance[last], importance[last]
    for newest in range(parts):
        for other in range(rest):
            number = numbers[0, newest, other]
            cost = ordered[other] - base + number * (slope + weight * number)
            if pairs:
                number = numbers[1, newest, other]
                cost += number * (slope_2 + weight_2 * number)
            costs[newest, other] = cost


@_part
def _extend_wide(
    ordered: Floats,
    numbers: Floats,
    wanted: Floats,
    importance: Floats,
    costs: Floats,
    parts: int,
    rest: int,
    pairs: bool,
) -> None:
    base = ordered[0] if ordered[0] < UNREACHED else np.float32(0)
    last = len(wanted) - 1
    slope, weight = TWICE * wanted[0] * importance[0], importance[0]
    slope_2, weight_2 = TWICE * wanted[last] * importance[last], importance[last]
    for other in range(rest):
        for newest in range(parts):
            number = numbers[0, other, newest]
            cost = ordered[other] - base + number * (slope + weight * number)
            if pairs:
                number = numbers[1, other, newest]
                cost += number * (slope_2 + weight_2 * number)
            costs[other, newest] = cost
