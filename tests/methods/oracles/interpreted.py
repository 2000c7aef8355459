"""Cases that `test_viterbi_triton.py` gives the search on GPUs, which it also runs where there is none:

    TRITON_INTERPRET=1 python -m tests.methods.oracles.interpreted ANSWERS

Triton decides when it is imported whether its kernels are compiled or interpreted, hence the process of its own. It
writes the states found for every case, and the codes of a matrix, into ANSWERS, a file of numpy's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.methods.solvers.streams import TrellisStreams
from llmcompress.weight.trellis import Trellis
from tests.builders import TRELLISES, seeded

KINDS = ("any", "coarse", "worthless", "doubled")
MATRIX = Trellis(2, 1, 8)


@dataclass(frozen=True)
class Case:
    """A column of three streams, the first a step long; the second must end as it is told."""

    trellis: Trellis
    kind: str
    edges: tuple[int, ...] = (0, 1, 12, 28)
    starts: tuple[int, ...] = (0, 5, 3)
    ends: tuple[int, ...] = (-1, 9, -1)

    def wishes(self) -> tuple[Tensor, Tensor]:
        """(wanted, importance), float32 `[steps, values]`."""
        size = (self.edges[-1], self.trellis.values)
        wanted, importance = torch.randn(size, generator=seeded(1)), torch.rand(size, generator=seeded(2))
        if self.kind == "coarse":  # so that sums are rounded to where their order shows
            importance[::6] *= 1e8
        elif self.kind == "worthless":  # all ways cost the same
            importance.zero_()
        elif self.kind == "doubled":  # many do
            importance[::2] = 0
        return wanted, importance

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """(first step, step after the last, start, end) of every stream."""
        return list(zip(self.edges[:-1], self.edges[1:], self.starts, self.ends, strict=True))


LANES = 128  # for the interpreter, so that small trellises too are looked at in several parts
CASES = [Case(trellis, kind) for trellis in (TRELLISES[0], TRELLISES[1], TRELLISES[3]) for kind in KINDS]
CASES += [Case(TRELLISES[4], "doubled", (0, 1, 3, 6))]


def on(device: str, case: Case) -> NDArray[np.int32]:
    """The states that the kernel finds on a device: under the interpreter, the CPU."""
    from llmcompress.methods.solvers.viterbi_triton import search

    wanted, importance = (asked.to(device) for asked in case.wishes())
    starts, ends = (torch.tensor(given, dtype=torch.int32, device=device) for given in (case.starts, case.ends))
    found: NDArray[np.int32] = search(case.trellis, list(case.edges), importance)(wanted, starts, ends).numpy(
        force=True
    )
    return found


def codes(device: str) -> NDArray[np.uint8]:
    """Codes of a matrix whose columns were chosen one after the other, and one of them again."""
    columns = TrellisStreams(torch.rand(22, 1, generator=seeded(3)).half().to(device) + 0.5, 4, MATRIX, run=12)
    wanted = torch.randn(5, 22, generator=seeded(4)).to(device)
    for column, values in zip((0, 1, 2, 3, 1), wanted, strict=True):
        columns.project(column, values)
    again = TrellisStreams.of(columns.weight(wanted[:4].T))
    again.project(2, wanted[0])
    found: NDArray[np.uint8] = again.weight(wanted[:4].T).codes.numpy(force=True)
    return found


if __name__ == "__main__":
    from llmcompress.methods.solvers import viterbi_triton

    with mock.patch.object(viterbi_triton, "LANES", LANES):
        ways = [on("cpu", case) for case in CASES]
        with mock.patch("llmcompress.methods.solvers.streams.stream_search", viterbi_triton.search):
            np.savez(sys.argv[1], *ways, matrix=codes("cpu"))
