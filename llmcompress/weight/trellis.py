"""The bit-shift trellis: the numbers that a stream of codes stands for (QTIP, arXiv 2406.11235).

A step's code, `bits` wide, is shifted into a state of `memory` bits, and a table has one number for every state, or
`values` of them: state = (state << bits | code) mod 2^memory. So a code decides its own numbers and, together with
later ones, those of the next steps: many more numbers than 2^bits, at `bits` a step. Streams start in state 0.

The numbers are functions of these three sizes, nothing of them is stored. Differs from the paper, whose tables are
random: here the numbers of the 2^bits states that can follow a state, and of those that it can follow, lie one in each
of 2^bits equally likely parts of the Gaussian. At 2 bits and a memory of 12 that lowers the squared error on a Gaussian
from 0.0733 to 0.0701 (0.0625 is the limit), as much as two more bits of memory do.

There are two codes. `table` has a number of its own for every state. `linear` has 64 to 256 int8 numbers that
processors look up fast
(`linear_code.py`), with a lower error still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from llmcompress.weight.constants import constant
from llmcompress.weight.hashing import scramble
from llmcompress.weight.linear_code import linear_code

Code = Literal["table", "linear"]
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Trellis:
    """A trellis by its three sizes and its code. Raises ValueError for sizes that do not go together."""

    bits: int  # of a step
    values: int  # that a step gives: 1 or 2
    memory: int  # bits of a state
    code: Code = "table"

    def __post_init__(self) -> None:
        if self.values not in (1, 2) or not 1 <= self.bits <= 7 or not 2 * self.bits <= self.memory <= 16:
            raise ValueError(f"{self} is none: bits 1 to 7, 1 or 2 values, a memory of twice the bits up to 16")

    @property
    def rate(self) -> float:
        """Bits a number."""
        return self.bits / self.values


def table(trellis: Trellis) -> Tensor:
    """The numbers of every state, float32 `[2^memory, values]`, each one that bfloat16 can hold."""
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
    part = newest ^ oldest ^ (scramble(between) % parts)
    order = scramble(states + (1 << trellis.memory)).argsort(stable=True)  # within a part, no order is best
    order = order[part[order].argsort(stable=True)]
    found = torch.empty(len(states), trellis.values)
    found[order] = _gaussian(trellis).to(torch.bfloat16).float()
    return found


def _gaussian(trellis: Trellis) -> Tensor:
    """As many points as there are states, spread like a Gaussian, ordered by its equally likely parts; float64."""
    count = 1 << trellis.memory
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if trellis.values == 1:
        return torch.special.ndtri(shares)[:, None]
    radius, angle = torch.sqrt(-2 * torch.log1p(-shares)), 2 * math.pi * GOLDEN * torch.arange(count)
    points = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)  # the seeds of a sunflower
    groups = points[None]
    for cut in range(trellis.bits):  # halves by one coordinate, then by the other
        ranks = groups[..., cut % 2].argsort(dim=1, stable=True)
        groups = groups.gather(1, ranks[..., None].expand_as(groups)).reshape(2 * len(groups), -1, 2)
    return groups.reshape(count, 2)


def states(codes: Tensor, trellis: Trellis) -> Tensor:
    """The states after each code of a stream, uint8 `[steps]`, that starts in state 0: int32 `[steps]`."""
    window, held = codes.int(), 1  # the codes held in a number
    while held * trellis.bits < trellis.memory:
        earlier = window[:-held] << (held * trellis.bits)
        window[held:] |= earlier
        held *= 2
    return window & ((1 << trellis.memory) - 1)


# --- matrices ------------------------------------------------------------------------------------------------------


def cuts(rows: int, run: int, trellis: Trellis) -> list[int]:
    """Return the step of a column at which each stream starts, and the end: `run` rows each, or what is left."""
    return [row // trellis.values for row in (*range(0, rows, run), rows)]


def matrix(codes: Tensor, rows: int, trellis: Trellis, run: int) -> Tensor:
    """Decode codes, flat uint8, to a matrix of so many rows, float32 `[rows, in]`.

    Rows come in runs, so that several can be searched at a time, and the streams of these follow each other. A stream
    goes down its rows of the first column, a step giving `values` of them, and on with the next column.
    """
    numbers, steps = table(trellis).to(codes.device), rows // trellis.values
    width = len(codes) // steps
    found = []
    for first, last in pairwise(cuts(rows, run, trellis)):
        stream = numbers[states(codes[first * width : last * width], trellis)]
        found.append(stream.reshape(width, -1).T)
    return torch.cat(found) if len(found) > 1 else found[0]
