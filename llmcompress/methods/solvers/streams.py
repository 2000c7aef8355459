"""The columns of a matrix as streams of a trellis, while they are being chosen."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.weight.nodes import TrellisCodes, shape
from llmcompress.weight.trellis import Trellis, cuts, states, table


class TrellisStreams:
    """A `BlockProjection` of the columns of a matrix to the nearest streams.

    A column of a chain starts in the state in which the one before it ended. One that is chosen again must end as it
    did before, where the next one starts; so columns can be chosen again in any order. Rings are free of each other.
    Everything stays on the device of the weights, and no column waits for a GPU.
    """

    strides: tuple[int, ...] = ()

    def __init__(self, scale: Tensor, width: int, trellis: Trellis, run: int, rows: Tensor | None = None) -> None:
        """Take `width` columns under a float16 scale `[out, 1]` a row; `rows [out]`: importance of squared errors."""
        self.scale, self.trellis, self.run = scale, trellis, run
        self.edges = tuple(cuts(len(scale), run, trellis))
        device = scale.device
        self.states = torch.zeros(width, self.edges[-1], dtype=torch.int32, device=device)
        self.ends = torch.full((width + 1, len(self.edges) - 1), -1, dtype=torch.int32, device=device)
        self.ends[0] = 0
        self.factors = scale[:, 0].float()
        importance = self.factors.square() if rows is None else self.factors.square() * rows
        runs = [importance[first * trellis.values : last * trellis.values] for first, last in pairwise(self.edges)]
        self.weights = torch.cat([whole_weights(run, trellis) for run in runs])  # streams do not share their costs
        self.numbers = _numbers(trellis, device)

    @staticmethod
    def of(w: TrellisCodes, rows: Tensor | None = None) -> TrellisStreams:
        """Return the columns of `w`, to be chosen again."""
        width = shape(w)[1]
        found = TrellisStreams(w.scale, width, w.trellis, w.run, rows)
        for first, last in pairwise(found.edges):
            found.states[:, first:last] = states(w.codes[first * width : last * width], width, w.trellis)
        last_steps = torch.tensor(found.edges[1:], device=w.codes.device) - 1
        found.ends[1:] = found.states[:, last_steps]
        return found

    def project_block(self, columns: slice, current: Tensor, shares: Tensor | None) -> Tensor:
        """See `BlockProjection`."""
        return self.choose(columns.start, current[columns], shares)

    def choose(self, start: int, current: Tensor, shares: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Overwrite columns from `start` on, `current [columns, out]`, with stored values; see `BlockProjection`.

        With `before`, the values stored before, errors are the values stored now less those.
        """
        part = slice(start, start + len(current))
        ends = self.ends[start : part.stop + 1]
        taken = None if shares is None else shares.contiguous()
        block = ColumnBlock(current, self.weights, self.factors, self.edges, ends, taken, before)
        self.states[part], errors = choose_columns(block, self.numbers)
        return errors

    def weight(self, values: Tensor) -> TrellisCodes:
        """Return the expression for the chosen streams, which are `values [out, in]`."""
        streams = [self.states[:, first:last].reshape(-1) for first, last in pairwise(self.edges)]
        codes = torch.cat(streams).bitwise_and_((1 << self.trellis.bits) - 1).to(torch.uint8)
        return TrellisCodes(codes.to(values.device), self.scale, self.trellis, self.run)


@lru_cache(maxsize=16)
def _numbers(trellis: Trellis, device: torch.device) -> Numbers:
    return Numbers.on(device, trellis, table(trellis))
