"""The columns of a matrix as streams of a trellis, while they are being chosen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmcompress.trellis import Trellis, cuts, states, table
from llmcompress.viterbi import search
from llmcompress.weight import TrellisCoded, shape

RUN = 768  # rows: one thread searches them, and the first in a column have fewer choices


class Streams:
    """A `Projection`: what the columns of a matrix may become as streams, each the nearest to what is wanted.

    A column starts in the state in which the one before it ended. If it was chosen before, it must also end as it did
    then, since the next one goes on from there; then columns can be chosen again in any order.
    """

    strides: tuple[int, ...] = ()

    def __init__(self, scale: Tensor, width: int, trellis: Trellis, run: int) -> None:
        """For `width` columns under a float16 scale `[out, 1]` a row."""
        self.scale, self.trellis, self.run = scale, trellis, run
        self.edges = cuts(len(scale), run, trellis)
        self.states = np.zeros((width, self.edges[-1]), np.int32)
        self.ends = np.full((len(self.edges) - 1, width + 1), -1)
        self.ends[:, 0] = 0
        self.search, self.numbers = search(trellis), table(trellis)
        self.workers = _workers(torch.get_num_threads())
        self.importance = scale.float().square().reshape(-1, trellis.values).numpy(force=True)

    @staticmethod
    def of(w: TrellisCoded) -> Streams:
        """The columns that were chosen for `w`, to be chosen again."""
        width = shape(w)[1]
        found = Streams(w.scale, width, w.trellis, w.run)
        for stream, (first, last) in enumerate(pairwise(found.edges)):
            chosen = states(w.codes[first * width : last * width], w.trellis).reshape(width, -1)
            found.states[:, first:last] = chosen.numpy(force=True)
            found.ends[stream, 1:] = chosen[:, -1].numpy(force=True)
        return found

    def begin(self, column: int, current: Tensor) -> None:
        """Nothing is fitted on the way."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """The numbers `[out]` of the stream chosen for a column that would like to be `values [out]`."""
        scale = self.scale[:, 0].float()
        wanted = torch.where(scale > 0, values / scale, 0.0).reshape(-1, self.trellis.values).numpy(force=True)

        def choose(stream: int) -> None:
            part = slice(self.edges[stream], self.edges[stream + 1])
            start, end = int(self.ends[stream, column]), int(self.ends[stream, column + 1])
            found = self.search(wanted[part], self.importance[part], start, end)
            self.states[column, part], self.ends[stream, column + 1] = found, found[-1]

        count = len(self.ends)
        for _ in self.workers.map(choose, range(count)) if count > 1 else map(choose, range(1)):
            pass
        chosen = self.numbers[torch.from_numpy(self.states[column])].reshape(-1)
        return chosen.to(values.device) * scale

    def weight(self, values: Tensor) -> TrellisCoded:
        """The expression for the streams chosen, which are `values [out, in]`."""
        streams = [self.states[:, first:last].reshape(-1) for first, last in pairwise(self.edges)]
        codes = torch.from_numpy(np.concatenate(streams) & ((1 << self.trellis.bits) - 1)).to(torch.uint8)
        return TrellisCoded(codes.to(values.device), self.scale, self.trellis, self.run)


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that search streams side by side; kept, since there is something for them to do in every column."""
    return ThreadPoolExecutor(threads)
