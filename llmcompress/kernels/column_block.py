"""Blocks of columns to store, each column's error fed on to the later ones: the input of the kernels that choose codes.

`GridBlock` is rounded to grids (GPTQ, arXiv 2210.17323) or pruned (SparseGPT, arXiv 2301.00774). `ColumnBlock` becomes
streams of a trellis (QTIP, arXiv 2406.11235) by the Viterbi algorithm. A column is cut into streams, each searched by
itself; one call carries a stream through the whole block, since its errors move its rows of the later columns. A step
extends the cheapest paths to all states. States that share all but their oldest code lead to the same states, so only
the cheapest of them survives.

Costs are whole numbers, so that all devices find the same paths: `weight (x - wanted)^2`, computed by fused
multiply-adds, is rounded to whole numbers by adding 2^23. A key of 32 bits holds 20 bits of cost above the oldest code:
the lowest key is the cheapest path, and of equally cheap ones the one with the lowest oldest code. Of equally cheap
ends the lowest state wins. The lowest cost is subtracted every 16 steps, and costs are capped. `whole_weights` gives 12
of the bits to the largest weight, so squared errors are as if costs were real numbers.

A ring must end in the state in which it starts, its seam. First the cheapest path through the last steps of the column
and on through the first ones is searched; the seam is its state between them. Then the column is searched from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmcompress.weight.trellis import Trellis

COST = 12  # the lowest bit of a key's cost; below it is the oldest code
CAP = 1 << 30  # largest key of a state
WHOLE = 8388609.0  # 2^23 + 1: numbers added to it are rounded to whole ones
WIDEST = 10.0  # largest magnitude of a wanted number
EVERY = 16  # steps between subtractions of the lowest cost
WEIGHT_BITS = 12  # of the largest weight
ABOVE = 8.0  # largest weight in multiples of the median one, whose costs need bits too
SEAM = 64  # rows on each side of a seam that are searched for it
SHORT_STATES = 12  # bits of a state above which registers of a GPU hold numbers of 16 bits


@dataclass(frozen=True, eq=False)
class ColumnBlock:
    """Columns for the search of a trellis, contiguous tensors of one device.

    Attributes:
        current: float32 `[columns, out]`, the wanted numbers, replaced by the stored ones.
        weights: of `whole_weights`, float32 `[out]`, those of squared errors.
        factors: float32 `[out]`, the scales of numbers.
        edges: the first step of each stream, and the end.
        ends: int32 `[columns + 1, streams]`, the states before the first column and after each, without their oldest
            code, -1 for any; replaced by the chosen ones. Rings only write them.
        shares: float32 `[columns, columns]`, the shares of an error of a column (first) that later ones lose, if any.
        before: like `current`, the numbers stored before: errors are then the new ones less these.
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
    """The numbers of a trellis, `[values, states]`, whatever its code; `top`: the largest magnitude."""

    trellis: Trellis
    table: Tensor  # float32; of many states, on a GPU, 16 bits, which fit its registers
    top: float

    @staticmethod
    def on(device: torch.device, trellis: Trellis, table: Tensor) -> Numbers:
        """Return the numbers for a search on a device; `table` float32 `[states, values]`."""
        numbers = table.T.contiguous()
        if device.type == "cuda" and trellis.memory > SHORT_STATES:
            short = numbers.bfloat16()
            numbers = short if torch.equal(short.float(), numbers) else numbers.half()  # either way exact
        return Numbers(trellis, numbers.to(device), float(table.abs().max()))


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


@dataclass(frozen=True, eq=False)
class GridBlock:
    """Columns of which the first are rounded to grids, or pruned, contiguous tensors of one device.

    Attributes:
        current: float32 `[columns, out]`, the wanted numbers; those of rounded columns are replaced by the stored ones.
        parameters: 1 / scale, the code of 0, and the scale, float32 `[groups, out]` each.
        groups: int32 `[rounded]`, the group of each rounded column.
        levels: the number of codes; 0 for numbers that become bfloat16 times their scale, which is 1 or, to prune, 0.
        shares, before: as in `ColumnBlock`.
    """

    current: Tensor
    parameters: tuple[Tensor, Tensor, Tensor]
    groups: Tensor
    levels: int
    shares: Tensor | None = None
    before: Tensor | None = None
