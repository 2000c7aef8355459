"""AdaDim (arXiv 2309.15531): groups of a grid along the input or along the output, chosen for every layer.

All other integer methods have groups along the input: consecutive columns of a row. If an input channel is loud, or its
weights are unlike all others, every group across it pays. Groups along the output, consecutive rows of a column, keep
the scales of channels apart. Both are quantized with error feedback, as in `gptq`. The one with the smaller output
error tr(E H E^T) on the calibration inputs is stored: a Grid, or the Transpose of one. The report's `stored` names it.

Differs from the paper: the two finished results are compared, not two roundings to nearest, and a layer is judged by
its own outputs, not by its block's. A scale along the output is fitted to the column as it is when the loop reaches it.
A plan's bits must not depend on values. So a layer on whose shape the two take different bits, as when groups do not
divide its height, has groups along the input. The plan names the transposed grid wherever there is a choice; token
tables, whose rows must be found one by one, are therefore refused.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.layer import Layer, base_target, join, method, relative_error, term_beside_dense, with_base
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.grid import GridConfig, GridFormat, fit_grid, grid_of, grid_sketch, round_to
from llmcompress.methods.solvers.hessian import channel_energy, inverse_factor
from llmcompress.methods.solvers.projection import GridPoints
from llmcompress.weight.expression import bits
from llmcompress.weight.nodes import Transpose, Weight, shape


class AdaDim(GridConfig):
    """Arguments of `adadim`."""

    method: Literal["adadim"] = "adadim"
    group_size: int | None = Field(64, ge=1, description="weights per scale, along either axis; null for all of it")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = (
        {"bits": 3, "group_size": 16},
        {"bits": 2, "group_size": 16, "symmetric": False},
        {"bits": "ternary", "group_size": None},
    )

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        term = term_beside_dense(approx, "adadim")
        (rows, width), form = shape(approx), self.grid_format()
        if not takes_the_same((rows, width), form):
            return join(grid_sketch((rows, width), form), term)
        return join(Transpose(grid_sketch((width, rows), form)), term)


class DownColumns:
    """A `Projection` to grid points with groups along the output, fitted when the loop reaches their column."""

    strides: tuple[int, ...] = ()

    def __init__(self, form: GridFormat, rows: int) -> None:
        self.form, self.group_size = form, form.group(rows)
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def begin(self, column: int, current: Tensor) -> None:
        """Do nothing: groups are fitted in `project`."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the nearest points of the grid that is best for `values [out]`."""
        whole = len(values) // self.group_size * self.group_size
        parts = [part for part in (values[:whole].reshape(-1, self.group_size), values[whole:][None]) if part.numel()]
        fitted = [fit_grid(part, self.form) for part in parts]
        self.scales.append(torch.cat([scale for scale, _ in fitted])[:, 0])
        zeros = [zero for _, zero in fitted if zero is not None]
        if zeros:
            self.zeros.append(torch.cat(zeros)[:, 0])
        points = [round_to(part, *found, self.form.levels) for part, found in zip(parts, fitted, strict=True)]
        return torch.cat([part.flatten() for part in points])

    def weight(self, values: Tensor) -> Transpose:
        """Return the grid of the transposed matrix."""
        zero = torch.stack(self.zeros) if self.zeros else None
        lying = values.T.contiguous()
        return Transpose(grid_of(lying, torch.stack(self.scales), zero, self.form.levels, self.group_size))


@method("adadim", AdaDim, needs={"outer"})
def adadim(layer: Layer, config: AdaDim) -> Layer:
    """Quantize the base along the axis that leaves the smaller output error."""
    config.sketch(layer.approx)
    target, form = base_target(layer), config.grid_format()
    factor, notes = inverse_factor(layer.inputs, config.damping)
    along_input = GridPoints(form, target.shape[1], channel_energy(layer.inputs).float())
    found = feedback(target, factor, along_input)
    if takes_the_same(shape(found), form):
        other = feedback(target, factor, DownColumns(form, len(target)))
        if relative_error(target, other, layer.inputs) < relative_error(target, found, layer.inputs):
            found = other
    return with_base(layer, found, notes)


def takes_the_same(size: tuple[int, int], form: GridFormat) -> bool:
    """True if groups along either axis of a matrix `[out, in]` take equally many bits."""
    return bits(grid_sketch(size, form)) == bits(grid_sketch((size[1], size[0]), form))
