"""BiLLM (arXiv 2402.04291): salient columns binarized twice, the others in two groups by magnitude.

Minimises tr(E H E^T) in the feedback loop (or |E|^2, columns weighted by their energy, without feedback). The columns
with the largest sums of w^2 / U_jj^2 are salient: their weights are +-a1 +-a2, the second sign that of what the first
leaves. Of the others a row keeps +-a for weights of small and +-b for those of large magnitude. A few shares of salient
columns are tried on the weights, and the best one is kept. `rounds` alternates scales and signs after that, as ARB-LLM
does (arXiv 2410.03129).

Stores Where(salient columns, two binary grids, two binary grids). A sign and the bit that tells small from large are a
2-bit code of the levels +-a and +-b, and so are two planes with the scales b + a and b - a. So the bitmap is stored and
counted for the columns that need one, and training or refining the planes may move a weight between its groups. This
takes 2 bits a weight; the paper counts 1.1.

`bitmap: all` splits salient columns by magnitude too, in place of binarizing them twice: four groups of weights a row,
each with its own scale, in the same bits (the column-group bitmap of ARB-LLM; a second plane beside the bitmap would be
a third bit for each salient weight, and is not there). `columns: true` stores a factor for every column as well
(ARB-RC, see `ColumnScales`).

Differs from the paper: the split is the best one for each row, found in sorted magnitudes, not one of 81 percentiles of
a whole block. Scales belong to rows, or to `group_size` columns, not always to 128. No means are stored. Saliences only
rank columns, and errors are those of weights; the official code searches and splits saliences. Every column's error is
fed back to the next one; the official code updates later blocks only, by the diagonal alone.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.layer import Layer, join, method, term_beside_dense
from llmcompress.methods.solvers.bitplanes import (
    ColumnConfig,
    PlaneFormat,
    Planes,
    fit_planes,
    planes_sketch,
    quantize_to_planes,
    squared_error,
)
from llmcompress.methods.solvers.projection import Selection, columns
from llmcompress.weight.nodes import Columns, Weight, Where, shape

SHARES = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of columns, tried as salient


class BiLLM(ColumnConfig):
    """Arguments of `billm`."""

    method: Literal["billm"] = "billm"
    rounds: int = Field(0, ge=0, le=100, description="alternations of scales and signs (ARB); 0: none, as in the paper")
    bitmap: Literal["others", "all"] = Field(
        "others",
        description="columns that are split by magnitude: those that are not salient, or both kinds, each by itself",
    )
    examples = (
        {},
        {"group_size": 16},
        {"rounds": 15},
        {"feedback": False},
        {"bitmap": "all", "group_size": 16, "columns": True, "rounds": 15},
    )

    def salient(self) -> PlaneFormat:
        """Return the form of salient columns."""
        return PlaneFormat(2, "residual" if self.bitmap == "others" else "split", self.group_size, self.rounds)

    def others(self) -> PlaneFormat:
        """Return the form of the other columns."""
        return PlaneFormat(2, "split", self.group_size, self.rounds)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        size = shape(approx)
        index = Columns(torch.zeros(size[1], dtype=torch.bool))  # all columns cost the same
        planes = planes_sketch(size, self.salient()), planes_sketch(size, self.others())
        return join(self.with_columns(Where(index, *planes)), term_beside_dense(approx, "a sum of binary planes"))


@method("billm", BiLLM, needs={"outer"})
def billm(layer: Layer, config: BiLLM) -> Layer:
    """Binarize the base, salient columns in another way than the rest."""

    def make(energy: Tensor, pivots: Tensor) -> Selection:
        inside, outside = (Planes(form, len(energy), energy) for form in (config.salient(), config.others()))

        def choose(current: Tensor, start: int) -> Tensor:
            span = slice(start, start + len(current))
            return salient_columns(current, pivots[span], energy[span], config)[:, None].expand_as(current)

        return Selection(inside, outside, choose, inside.group_size, columns)

    return quantize_to_planes(layer, config, make, config.columns)


def salient_columns(current: Tensor, pivots: Tensor, energy: Tensor, config: BiLLM) -> Tensor:
    """Return a mask of the salient columns of `current [columns, out]`: the best ones, of the share that loses least.

    `pivots [columns]`: U_jj^2; `energy [columns]` weights the columns' errors.
    """
    ranked = (current.square().sum(1) / pivots).argsort(descending=True, stable=True)
    salient, least = torch.zeros_like(pivots, dtype=torch.bool), float("inf")
    for count in sorted({round(share * len(current)) for share in SHARES}):
        error = 0.0
        for chosen, form in ((ranked[:count], config.salient()), (ranked[count:], config.others())):
            if len(chosen):
                weight, importance = current[chosen].T.contiguous(), energy[chosen]
                error += float(squared_error(weight, *fit_planes(weight, form, importance), importance).sum())
        if error < least:
            least, salient = error, torch.zeros_like(salient).index_fill_(0, ranked[:count], True)
    return salient
