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

ROWS = 768  # of a run, about: a run is searched by one thread, and its first numbers in a column have fewer choices


class Streams:
    """A `Projection`: what the columns of a matrix may become as streams, each the nearest to what is wanted.

    A column starts in the state in which the one before it ended. If it was chosen before, it must also end as it did
    then, since the next one goes on from there; then columns can be chosen again in any order.
    """

    strides: tuple[int, ...] = ()

    def __init__(self, scale: Tensor, width: int, trellis: Trellis, runs: int) -> None:
        """For `width` columns under a float16 scale `[out, 1]` a row."""
        self.scale, self.trellis, self.runs = scale, trellis, runs
        self.edges = cuts(len(scale) // trellis.values, runs)
        self.states = np.zeros((self.edges[-1], width), np.int32)
        self.ends = np.full((runs, width + 1), -1)
        self.ends[:, 0] = 0
        self.search, self.numbers = search(trellis), table(trellis)
        self.workers = _workers(torch.get_num_threads())
        self.importance = scale.float().square().reshape(-1, trellis.values).numpy(force=True)

    @staticmethod
    def of(w: TrellisCoded) -> Streams:
        """The columns that were chosen for `w`, to be chosen again."""
        width = shape(w)[1]
        found = Streams(w.scale, width, w.trellis, w.runs)
        for run, (first, last) in enumerate(pairwise(found.edges)):
            chosen = states(w.codes[first * width : last * width], w.trellis).reshape(width, -1)
            found.states[first:last] = chosen.T.numpy(force=True)
            found.ends[run, 1:] = chosen[:, -1].numpy(force=True)
        return found

    def begin(self, column: int, current: Tensor) -> None:
        """Nothing is fitted on the way."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """The numbers `[out]` of the stream chosen for a column that would like to be `values [out]`."""
        scale = self.scale[:, 0].float()
        wanted = torch.where(scale > 0, values / scale, 0.0).reshape(-1, self.trellis.values).numpy(force=True)

        def choose(run: int) -> None:
            part = slice(self.edges[run], self.edges[run + 1])
            start, end = int(self.ends[run, column]), int(self.ends[run, column + 1])
            found = self.search(wanted[part], self.importance[part], start, end)
            self.states[part, column], self.ends[run, column + 1] = found, found[-1]

        for _ in self.workers.map(choose, range(self.runs)) if self.runs > 1 else map(choose, range(1)):
            pass
        chosen = self.numbers[torch.from_numpy(self.states[:, column])].reshape(-1)
        return chosen.to(values.device) * scale

    def weight(self, values: Tensor) -> TrellisCoded:
        """The expression for the streams chosen, which are `values [out, in]`."""
        streams = [self.states[first:last].T.reshape(-1) for first, last in pairwise(self.edges)]
        codes = torch.from_numpy(np.concatenate(streams) & ((1 << self.trellis.bits) - 1)).to(torch.uint8)
        return TrellisCoded(codes.to(values.device), self.scale, self.trellis, self.runs)


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that search runs side by side; kept, since there is something for them to do in every column."""
    return ThreadPoolExecutor(threads)
