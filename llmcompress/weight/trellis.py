"""The bit-shift trellis: the numbers that a stream of codes stands for (QTIP, arXiv 2406.11235).

A step's code, `bits` wide, is shifted into a state of `memory` bits: state = (state << bits | code) mod 2^memory. A
table has `values` numbers for every state. So a code decides its own numbers and, with later codes, those of the next
steps: many more numbers than 2^bits, at `bits` a step. A chain starts in state 0 and goes on from column to column. A
ring is a column of its own: it starts in the state in which it ends. Tables follow from the sizes alone; nothing of
them is stored. There are two codes:

- `table`: a number of its own for every state. Differs from the paper, whose tables are random: here the numbers of the
  2^bits states that can follow a state, and of those that it can follow, lie one in each of 2^bits equally likely parts
  of the Gaussian. At 2 bits and a memory of 12 that lowers the squared error on a Gaussian from 0.0733 to 0.0701
  (0.0625 is the limit), as much as two more bits of memory do.
- `linear`: 64 to 256 int8 numbers, which processors look up fast, with a lower error still (`LinearCode`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal

import torch
from torch import Tensor

from llmcompress.weight.constants import constant

Code = Literal["table", "linear"]
GOLDEN = (math.sqrt(5) - 1) / 2
UNIT = 1 / 32  # of the int8 numbers of a linear code; bfloat16 holds their products exactly
SEEDS = {  # of linear codes by (bits, values), for memories from 8 bits on; None: no such code; longer memories: 0
    (1, 1): (62, 54, 20, 44, 13, 10, 1),
    (3, 2): (60, 12, 8, 21, 21, 8, 7),
    (2, 1): (33, 58, 2, 8, 3, 3, 3),
    (5, 2): (None, None, 42, 47, 47, 6, 3),
    (3, 1): (45, 45, 58, 3, 52, 3, 7),
    (7, 2): (None, None, None, None, None, None, 4),
    (4, 1): (63, 3, 6, 13, 24, 10, 5),
}


@dataclass(frozen=True)
class Trellis:
    """A trellis by its three sizes and its code. Raises ValueError for sizes that do not go together."""

    bits: int  # of a step
    values: int  # that a step gives: 1 or 2
    memory: int  # bits of a state
    code: Code = "table"
    ring: bool = False  # True if each column of a run goes round

    def __post_init__(self) -> None:
        if self.values not in (1, 2) or not 1 <= self.bits <= 7 or not 2 * self.bits <= self.memory <= 16:
            raise ValueError(f"{self} is none: bits 1 to 7, 1 or 2 values, a memory of twice the bits up to 16")

    @property
    def rate(self) -> float:
        """Bits a number."""
        return self.bits / self.values


def table(trellis: Trellis) -> Tensor:
    """Return the numbers of every state, float32 `[2^memory, values]`, each one that bfloat16 can hold."""
    return _table(trellis.bits, trellis.values, trellis.memory, trellis.code)


@constant
def _table(bits: int, values: int, memory: int, code: Code) -> Tensor:
    trellis = Trellis(bits, values, memory, code)
    states = torch.arange(1 << trellis.memory)
    if trellis.code == "linear":
        return linear_code(trellis.bits, trellis.values, trellis.memory).table(states)
    parts = 1 << trellis.bits
    newest, oldest = states % parts, states >> (trellis.memory - trellis.bits)
    between = (states >> trellis.bits) % (1 << (trellis.memory - 2 * trellis.bits))
    part = newest ^ oldest ^ (_scramble(between) % parts)
    order = _scramble(states + (1 << trellis.memory)).argsort(stable=True)  # within a part, no order is best
    order = order[part[order].argsort(stable=True)]
    numbers = torch.empty(len(states), trellis.values, dtype=torch.float32)
    numbers[order] = _gaussian(trellis).to(torch.bfloat16).float()
    return numbers


def _gaussian(trellis: Trellis) -> Tensor:
    """As many points as there are states, spread like a Gaussian, ordered by its equally likely parts; float64."""
    states = 1 << trellis.memory
    shares = (torch.arange(states, dtype=torch.float64) + 0.5) / states
    if trellis.values == 1:
        return torch.special.ndtri(shares)[:, None]
    numbers = torch.arange(states, dtype=torch.float32)
    radius, angle = torch.sqrt(-2 * torch.log1p(-shares)), 2 * math.pi * GOLDEN * numbers
    points = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)  # the seeds of a sunflower
    groups = points[None]
    for cut in range(trellis.bits):  # halves by one coordinate, then by the other
        ranks = groups[..., cut % 2].argsort(dim=1, stable=True)
        groups = groups.gather(1, ranks[..., None].expand_as(groups)).reshape(2 * len(groups), -1, 2)
    return groups.reshape(states, 2)


# --- streams and matrices -------------------------------------------------------------------------------------------


def states(codes: Tensor, width: int, trellis: Trellis) -> Tensor:
    """Return the states after each code of a run of rows, uint8 `[width * steps]`: int32 `[width, steps]`."""
    window, held = codes.reshape(width if trellis.ring else 1, -1).int(), 1  # codes that a number holds
    while held * trellis.bits < trellis.memory:
        earlier = window.roll(held, 1) << (held * trellis.bits)
        if not trellis.ring:
            earlier[:, :held] = 0
        window |= earlier
        held *= 2
    return (window & ((1 << trellis.memory) - 1)).reshape(width, -1)


def cuts(rows: int, run: int, trellis: Trellis) -> list[int]:
    """Return the step of a column at which each stream starts, and the end: `run` rows each, or what is left.

    Less than half a run would be a ring of few steps, so the one before it goes on to the end.
    """
    starts = list(range(0, rows, run))
    if trellis.ring and len(starts) > 1 and rows - starts[-1] < run / 2:
        starts.pop()
    return [row // trellis.values for row in (*starts, rows)]


def matrix(codes: Tensor, rows: int, trellis: Trellis, run: int) -> Tensor:
    """Decode codes, flat uint8, to a matrix of so many rows, float32 `[rows, in]`.

    Rows come in runs, so that several can be searched at a time; the codes of the runs follow each other. Those of a
    run go down its rows of the first column, a step giving `values` of them, and on with the next column.
    """
    numbers, steps = table(trellis).to(codes.device), rows // trellis.values
    width = len(codes) // steps
    values = numbers.new_empty(rows, width)  # filled run by run: a token table may be most of the memory
    for first, last in pairwise(cuts(rows, run, trellis)):
        stream = numbers[states(codes[first * width : last * width], width, trellis)]
        values[first * trellis.values : last * trellis.values] = stream.reshape(width, -1).T
    return values


# --- linear codes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LinearCode:
    """A few int8 numbers, looked up by a linear index of the state, for each of the `values` of a step.

    A processor looks up 16 to 128 bytes in one or two instructions, but reads one of 4,096 numbers at a time. So an
    index of 6 to 8 bits, each the sum (mod 2) of some bits of the state, names an int8 number. Memory, search and bits
    are those of any trellis of these sizes.

    Numbers are quantiles of a Gaussian, wider for more bits. The lowest bits of an index say in which of the equally
    likely parts of the Gaussian the number lies; each is the sum of a bit of the newest code, one of the oldest and
    some between. So the states that follow a state, and those that it follows, have a number in each part. All other
    sums are drawn by a hash of a seed; `SEEDS` has the best of 64 for each size, of 12 for a memory over 12
    (`research/trellis_codes.py --find`), by the squared error on 24,000 numbers of a Gaussian. On 48,000 others it is,
    with a memory of 12, at 1, 1.5, 2, 2.5, 3 and 4 bits 2.5, 1.2, 0.6, 2.3, 1.4 and 1.4 % below that of `table`; with a
    memory of 14 it is from 1.3 % below to 1.9 % above it.

    `masks[value][bit]`: the bits of a state whose sum, mod 2, is this bit of the index. `numbers[value]`: int8
    `[2^index bits]`, in units of `UNIT`.
    """

    masks: tuple[tuple[int, ...], ...]
    numbers: tuple[Tensor, ...]

    def table(self, states: Tensor) -> Tensor:
        """Return the numbers of `states`, int64 `[n]`: float32 `[n, values]`."""
        pairs = zip(self.masks, self.numbers)
        return torch.stack([numbers[index(states, masks)].float() * UNIT for masks, numbers in pairs], 1)


def linear_code(bits: int, values: int, memory: int, seed: int | None = None) -> LinearCode:
    """Return the linear code of a trellis of these sizes; `seed` of the hash, by default that of `SEEDS`."""
    rate = bits / values
    width = min(max(6, 4 - (-bits // values)), 8, memory)  # of an index: 64 numbers up to 2 bits
    own = [bits - bits // 2, bits // 2] if values == 2 else [bits]  # bits that each value's part takes
    for candidate in count(_seed(bits, values, memory) if seed is None else seed):
        masks = _masks(bits, memory, width, own, candidate)
        if all(map(_are_independent, masks)):
            break
    return LinearCode(masks, tuple(_quantiles(width, part, 0.82 + 0.1 * rate) for part in own))


def _seed(bits: int, values: int, memory: int) -> int:
    """Return the seed for a size, 0 if none was searched for. Files hold sizes alone, so it must never change."""
    known = SEEDS.get((bits, values), ())
    return known[memory - 8] or 0 if 0 <= memory - 8 < len(known) else 0


def index(states: Tensor, masks: tuple[int, ...]) -> Tensor:
    """Return the index of each of `states`, int64: sums of the bits that `masks` name."""
    indices = torch.zeros_like(states)
    for bit, mask in enumerate(masks):
        parity = states & mask
        for shift in (8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        indices |= (parity & 1) << bit
    return indices


def _masks(bits: int, memory: int, width: int, own: list[int], seed: int) -> tuple[tuple[int, ...], ...]:
    """Draw the sums: the lowest `own[value]` bits of each index name the part."""
    draws = _numbers_below(1 << memory, seed)
    between = ((1 << (memory - bits)) - 1) >> bits << bits
    newest = iter(range(bits))
    masks = []
    for parts in own:
        named = [
            1 << bit | 1 << (memory - bits + bit) | (next(draws) & between) for _, bit in zip(range(parts), newest)
        ]
        masks.append((*named, *(next(draws) for _ in range(width - parts))))
    return tuple(masks)


def _are_independent(masks: tuple[int, ...]) -> bool:
    """True if no sum is a sum of others, so that all indices are equally likely."""
    pivots: list[int] = []
    for mask in masks:
        for pivot in pivots:
            mask = min(mask, mask ^ pivot)
        if not mask:
            return False
        pivots.append(mask)
    return True


def _quantiles(width: int, part: int, spread: float) -> Tensor:
    """Return the numbers by index, int8 `[2^width]`, whose lowest `part` bits name the part of the Gaussian."""
    places = torch.arange(1 << width)
    ranks = (places % (1 << part)) << (width - part) | places >> part
    quantiles = torch.special.ndtri((ranks.double() + 0.5) / (1 << width))
    return (quantiles * spread / UNIT).round().to(torch.int8)


# --- a hash in place of random draws, which differ between versions of a library ------------------------------------


def _numbers_below(limit: int, seed: int) -> Iterator[int]:
    """Yield numbers that look random, the same everywhere."""
    return (int(_scramble(torch.tensor(seed << 8 | place))) % limit for place in count(1))


def _scramble(numbers: Tensor) -> Tensor:
    """Return numbers below 2^31 that look random, of int64 numbers below 2^31; the same everywhere."""
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        numbers = (numbers ^ (numbers >> shift)) * factor % (1 << 31)
    return numbers
