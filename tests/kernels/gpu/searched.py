"""Blocks of columns that `test_column_search.py` lets a GPU choose, or Triton's interpreter where there is none:

    TRITON_INTERPRET=1 python -m tests.kernels.gpu.searched ANSWERS

Triton decides when it is imported whether its kernels are compiled or interpreted, hence the process of its own. It
writes what every case has become into ANSWERS, a file of torch's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, GridBlock, whole_weights
from llmcompress.weight.trellis import Trellis
from tests.builders import RINGS, TRELLISES, seeded
from tests.methods.oracles.columns import numbers_of

SHORT, CHUNKS = (0, 1, 12, 28), (0, 131, 132, 196)  # steps; the second has a stream of more than two chunks
ROUND = (0, 10, 21, 51)


@dataclass(frozen=True)
class Case:
    """Three columns of three streams, of which the last must end its second column as told."""

    trellis: Trellis
    kind: str  # of errors: `fed`, `moved` (by what a column chosen again moves by) or `kept`
    edges: tuple[int, ...] = SHORT

    def block(self, device: str) -> ColumnBlock:
        """Return the columns, on a device."""
        rows = self.edges[-1] * self.trellis.values
        factors = torch.rand(rows, generator=seeded(1)) + 0.5
        factors[3] = 0
        ends = torch.full((4, 3), -1, dtype=torch.int32)
        ends[0], ends[2, 2] = torch.tensor([0, 5, 3]), 9
        wanted, before = 2 * torch.randn(2, 3, rows, generator=seeded(2))
        shares = torch.randn(3, 3, generator=seeded(3)) / 3
        weights = whole_weights(factors.square(), self.trellis)
        tensors = (each.to(device) for each in (wanted, weights, factors, ends, shares, before))
        current, weights, factors, ends, shares, before = tensors
        fed, again = (None, None) if self.kind == "kept" else (shares, before if self.kind == "moved" else None)
        return ColumnBlock(current, weights, factors, self.edges, ends, fed, again)


CASES = [Case(trellis, "fed") for trellis in (*TRELLISES[:5], Trellis(4, 1, 8), Trellis(5, 2, 10), Trellis(2, 1, 13))]
CASES += [Case(TRELLISES[1], "moved"), Case(TRELLISES[1], "kept"), Case(Trellis(2, 1, 12), "fed", CHUNKS)]
CASES += [Case(trellis, "fed", ROUND) for trellis in (*RINGS, Trellis(4, 1, 8, ring=True))]
CASES += [Case(Trellis(2, 1, memory, "linear", ring=True), "moved", (0, 131, 261, 325)) for memory in (10, 13)]


def found(case: Case, device: str, choose: Any) -> tuple[Tensor, ...]:
    """Return states, errors (nothing where they are not fed), stored values and ends, chosen in two goes."""
    block = case.block(device)
    states = torch.zeros(3, case.edges[-1], dtype=torch.int32, device=device)
    errors = torch.zeros_like(block.current)
    for streams in (range(2), range(2, 3)):
        choose(block, numbers_of(case.trellis, device), states, errors, streams)
    return tuple(each.cpu() for each in (states, errors * (case.kind != "kept"), block.current, block.ends))


def round_once() -> None:
    """Let the interpreter round `tl.fma` once, as a GPU does."""
    from triton.runtime import interpreter

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


GRIDS = [(fed, rounded, levels) for fed in (True, False) for rounded in (5, 4, 3) for levels in (8, 0)]


def grid_block(fed: bool, rounded: int, levels: int, device: str) -> GridBlock:
    """Return five columns of 150 rows in two groups, of which some are rounded; all five for the second time.

    Without `levels` they are pruned.
    """
    random = seeded(4)
    current, scale = torch.randn(5, 150, generator=random), torch.rand(2, 150, generator=random) + 0.1
    scale = scale if levels else (scale > 0.5).float()
    parameters = (1 / scale, torch.randint(8, (2, 150), generator=random).float(), scale)
    groups, shares = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32), torch.randn(5, 5, generator=random) / 3
    inverse, middle, scale = (each.to(device) for each in parameters)
    own = shares.to(device) if fed else None
    before = torch.randn(5, 150, generator=random).to(device) if fed and rounded == 5 else None
    return GridBlock(current.to(device), (inverse, middle, scale), groups[:rounded].to(device), levels, own, before)


def rounded_on(device: str, round_columns: Any) -> list[tuple[Tensor, Tensor]]:
    """Return what blocks of grids have become, and their errors."""
    answers = []
    for fed, rounded, levels in GRIDS:
        block = grid_block(fed, rounded, levels, device)
        errors = torch.zeros_like(block.current)
        round_columns(block, errors)
        answers.append((block.current.cpu(), errors.cpu()))
    return answers


if __name__ == "__main__":
    from llmcompress.kernels.gpu.column_search import choose
    from llmcompress.kernels.gpu.grid_columns import round_columns

    round_once()
    searched, grids = [found(case, "cpu", choose) for case in CASES], rounded_on("cpu", round_columns)
    torch.save((searched, grids), sys.argv[1])
