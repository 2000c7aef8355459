"""A run of columns to be rounded to grids, each error fed on to later columns of the run (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class GridBlock:
    """Columns of a matrix, of which the first are rounded; contiguous tensors of one device.

    `current` float32 `[columns, out]`: what is wanted, and of rounded columns afterwards what is stored. `parameters`:
    1 / scale, the code that stands for 0, and the scale, float32 `[groups, out]` each. `groups` int32 `[rounded]`: the
    group of each column that is rounded. `shares` float32 `[columns, columns]`: what an error of a column (first) takes
    from a later one; None: nothing. `before`, like `current`: what was stored, and an error is what is stored now less
    that; None: it is what is lost.
    """

    current: Tensor
    parameters: tuple[Tensor, Tensor, Tensor]
    groups: Tensor
    levels: int
    shares: Tensor | None = None
    before: Tensor | None = None
