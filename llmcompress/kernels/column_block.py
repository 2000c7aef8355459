"""The nearest streams of a trellis for a block of columns: the Viterbi algorithm, on every device (QTIP, 2406.11235).

A column is cut into streams, each searched by itself, and within a block of columns a stream's errors move its rows of
the later columns, so one call carries a stream through the whole block. The cheapest path to every state is known, and
a step extends all of them; states that share all but their oldest code lead to the same states, so only the cheapest
of these survives.

Costs are whole numbers, so that all devices find the same paths: `weight (x - wanted)^2`, computed by fused
multiply-adds, is rounded to whole numbers by adding 2^23. A key of 32 bits holds 20 bits of cost above the oldest code,
so that the lowest key of several is the cheapest path, and of equally cheap ones that with the lowest oldest code; of
equally cheap ends that in the lowest state counts. The lowest cost is taken off every 16 steps, and costs are capped.
`whole_weights` gives 12 of the bits to the largest weight, so squared errors are as if costs were real numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmcompress.weight.trellis import Trellis

COST = 12  # the lowest bit of a key's cost; below it is the oldest code
CAP = 1 << 30  # the most that a state's key counts
WHOLE = 8388609.0  # 2^23 + 1: what is added to it is rounded to a whole number
WIDEST = 10.0  # what is wanted counts as no larger
EVERY = 16  # steps after which the lowest cost is taken off all
WEIGHT_BITS = 12  # of the largest weight
ABOVE = 8.0  # a weight counts as no more than so many times the median one, whose costs need bits too
SHORT_STATES = 12  # bits of a state from above which registers of a GPU hold numbers of 16 bits


@dataclass(frozen=True, eq=False)
class ColumnBlock:
    """Columns to choose, contiguous tensors of one device. A stream lasts from one of `edges`, in steps, to the next.

    `current` float32 `[columns, out]`: what is wanted, and afterwards what is stored. `weights`, of `whole_weights`,
    and `factors`, float32 `[out]`: what a squared error of a row counts, and what numbers are multiplied by. `ends`
    int32 `[columns + 1, streams]`: the states before the first column, and after each, -1 for any; afterwards those
    found. Of states that are given all but the oldest code counts.

    `shares` float32 `[columns, columns]`: what an error of a column (first) takes from a later one; None: nothing.
    `before`, like `current`: what was stored, and an error is what is stored now less that; None: it is what is lost.
    """

    current: Tensor
    weights: Tensor
    factors: Tensor
    edges: tuple[int, ...]
    ends: Tensor
    shares: Tensor | None = None
    before: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers of a trellis of these sizes, whatever its code, `[values, states]`; `top`: the largest of them."""

    trellis: Trellis
    table: Tensor  # float32, or on a GPU that should hold many in its registers 16 bits
    top: float

    @staticmethod
    def on(device: torch.device, trellis: Trellis, table: Tensor) -> Numbers:
        """For a search on a device; `table` float32 `[states, values]`."""
        found = table.T.contiguous()
        if device.type == "cuda" and trellis.memory > SHORT_STATES:
            short = found.bfloat16()
            found = short if torch.equal(short.float(), found) else found.half()  # either way exact
        return Numbers(trellis, found.to(device), float(table.abs().max()))


def whole_weights(weights: Tensor, trellis: Trellis) -> Tensor:
    """Return the weights `[rows]` of a stream, none below 0, in the unit of whole costs."""
    some = weights[weights > 0]
    if not len(some):
        return torch.zeros_like(weights)
    top = torch.minimum(some.max(), ABOVE * some.median())
    return (weights / top).clamp_max(1.0) * (2.0**WEIGHT_BITS / trellis.values)


def longest_stream(block: ColumnBlock) -> int:
    """Return the steps of the longest stream."""
    return max(last - first for first, last in pairwise(block.edges))
