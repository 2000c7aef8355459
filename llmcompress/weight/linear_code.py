"""Numbers of trellis states that need no large table: a few int8 numbers, looked up by a linear index.

A processor looks up 16 to 128 bytes in one or two instructions, but reads one of 4,096 numbers at a time. So a state
is mapped to an index of 6 to 8 bits, each the sum (mod 2) of some of its bits, and the index to an int8 number. Every
weight of a step has its own index. Memory, search and bits are those of any trellis of these sizes.

The numbers are quantiles of a Gaussian, the wider the more bits there are. The lowest bits of an index say in which of
the equally likely parts of the Gaussian the number lies; each is the sum of a bit of the newest code, one of the oldest
and some between. So the states that follow a state, and those that it follows, have a number in each part. All other
sums are drawn by a hash of a seed; `SEEDS` has the best of 64 for each size, of 12 for a memory over 12
(`research/trellis_codes.py --find`), by the squared error on 24,000 numbers of a Gaussian. On 48,000 others it is,
with a memory of 12, at 1, 1.5, 2, 2.5, 3 and 4 bits 2.5, 1.2, 0.6, 2.3, 1.4 and 1.4 % below that of as many numbers as
there are states; with a memory of 14 it is from 1.3 % below to 1.9 % above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from llmcompress.weight.hashing import scramble

UNIT = 1 / 32  # a number is an int8 in this unit, which bfloat16 holds exactly
SEEDS = {  # by (bits, values): of memories from 8 bits on, None where there is none; 0 for longer ones
    (1, 1): (62, 54, 20, 44, 13, 10, 1),
    (3, 2): (60, 12, 8, 21, 21, 8, 7),
    (2, 1): (33, 58, 2, 8, 3, 3, 3),
    (5, 2): (None, None, 42, 47, 47, 6, 3),
    (3, 1): (45, 45, 58, 3, 52, 3, 7),
    (7, 2): (None, None, None, None, None, None, 4),
    (4, 1): (63, 3, 6, 13, 24, 10, 5),
}


@dataclass(frozen=True, eq=False)
class LinearCode:
    """The code of a trellis, for each of the `values` of a step.

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
    """Return the code of a trellis of these sizes; `seed` of the hash, by default that of `SEEDS`."""
    rate = bits / values
    width = min(max(6, 4 - (-bits // values)), 8, memory)  # of an index: 64 numbers up to 2 bits
    own = [bits - bits // 2, bits // 2] if values == 2 else [bits]  # bits that each value's part takes
    seeds = count(_seed(bits, values, memory) if seed is None else seed)
    masks = next(
        found for seed in seeds for found in [_masks(bits, memory, width, own, seed)] if all(map(_free, found))
    )
    return LinearCode(masks, tuple(_quantiles(width, part, 0.82 + 0.1 * rate) for part in own))


def _seed(bits: int, values: int, memory: int) -> int:
    """Return the seed for a size, 0 if none was looked for. Files hold sizes alone, so it must never change."""
    known = SEEDS.get((bits, values), ())
    return known[memory - 8] or 0 if 0 <= memory - 8 < len(known) else 0


def index(states: Tensor, masks: tuple[int, ...]) -> Tensor:
    """Return the index of each of `states`, int64: sums of the bits that `masks` name."""
    found = torch.zeros_like(states)
    for bit, mask in enumerate(masks):
        held = states & mask
        for shift in (8, 4, 2, 1):
            held = held ^ (held >> shift)
        found |= (held & 1) << bit
    return found


def _masks(bits: int, memory: int, width: int, own: list[int], seed: int) -> tuple[tuple[int, ...], ...]:
    """Draw the sums: `own[value]` of each index name the part."""
    drawn = _numbers_below(1 << memory, seed)
    between = ((1 << (memory - bits)) - 1) >> bits << bits
    newest = iter(range(bits))
    masks = []
    for parts in own:
        named = [
            1 << bit | 1 << (memory - bits + bit) | (next(drawn) & between) for _, bit in zip(range(parts), newest)
        ]
        masks.append((*named, *(next(drawn) for _ in range(width - parts))))
    return tuple(masks)


def _numbers_below(limit: int, seed: int) -> Iterator[int]:
    """Yield numbers that look random, the same everywhere."""
    return (int(scramble(torch.tensor(seed << 8 | place))) % limit for place in count(1))


def _free(masks: tuple[int, ...]) -> bool:
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
    """The numbers by index, int8 `[2^width]`, whose lowest `part` bits name the part of the Gaussian."""
    places = torch.arange(1 << width)
    ranks = (places % (1 << part)) << (width - part) | places >> part
    quantiles = torch.special.ndtri((ranks.double() + 0.5) / (1 << width))
    return (quantiles * spread / UNIT).round().to(torch.int8)
