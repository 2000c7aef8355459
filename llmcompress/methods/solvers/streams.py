"""The columns of a matrix as streams of a trellis, while they are being chosen."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from llmcompress.methods.solvers.stream_search import stream_search
from llmcompress.weight.nodes import TrellisCoded, shape
from llmcompress.weight.trellis import Trellis, cuts, states, table


class TrellisStreams:
    """A `Projection` of the columns of a matrix to streams, each the nearest to the values wanted.

    A column starts in the state in which the one before it ended. If it was chosen before, it must also end as it did
    then, since the next one goes on from there; then columns can be chosen again in any order. All of it stays on the
    device of the weights, and no column waits for a GPU.
    """

    strides: tuple[int, ...] = ()

    def __init__(self, scale: Tensor, width: int, trellis: Trellis, run: int, rows: Tensor | None = None) -> None:
        """For `width` columns under a float16 scale `[out, 1]` a row; `rows [out]`: what the squared errors of each row
        count, None: alike."""
        self.scale, self.trellis, self.run = scale, trellis, run
        self.edges = cuts(len(scale), run, trellis)
        device = scale.device
        self.states = torch.zeros(width, self.edges[-1], dtype=torch.int32, device=device)
        self.ends = torch.full((width + 1, len(self.edges) - 1), -1, dtype=torch.int32, device=device)
        self.ends[0] = 0
        self.last = torch.tensor(self.edges[1:], device=device) - 1  # step of each stream in a column
        self.numbers = table(trellis).to(device)
        self.factors = scale[:, 0].float()
        empty = ~(self.factors > 0)
        self.empty = empty if bool(empty.any()) else None  # rows of zeros
        importance = self.factors.square() if rows is None else self.factors.square() * rows
        self.search = stream_search(trellis, self.edges, importance.reshape(-1, trellis.values))

    @staticmethod
    def of(w: TrellisCoded, rows: Tensor | None = None) -> TrellisStreams:
        """The columns that were chosen for `w`, to be chosen again."""
        width = shape(w)[1]
        found = TrellisStreams(w.scale, width, w.trellis, w.run, rows)
        for first, last in pairwise(found.edges):
            chosen = states(w.codes[first * width : last * width], w.trellis)
            found.states[:, first:last] = chosen.reshape(width, -1)
        found.ends[1:] = found.states[:, found.last]
        return found

    def begin(self, column: int, current: Tensor) -> None:
        """Nothing is fitted on the way."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """The numbers `[out]` of the stream chosen for a column that would like to be `values [out]`."""
        wanted = values / self.factors
        if self.empty is not None:
            wanted.masked_fill_(self.empty, 0.0)
        chosen = self.search(wanted.reshape(-1, self.trellis.values), self.ends[column], self.ends[column + 1])
        self.states[column], self.ends[column + 1] = chosen, chosen[self.last]
        return self.numbers[chosen].reshape(-1) * self.factors

    def weight(self, values: Tensor) -> TrellisCoded:
        """The expression for the streams chosen, which are `values [out, in]`."""
        streams = [self.states[:, first:last].reshape(-1) for first, last in pairwise(self.edges)]
        codes = torch.cat(streams).bitwise_and_((1 << self.trellis.bits) - 1).to(torch.uint8)
        return TrellisCoded(codes.to(values.device), self.scale, self.trellis, self.run)
