"""Sums of binary planes: every weight has a bit in each of several binary grids.

The grids' scales, of one row and group, make `2^planes` points: +-a1 +-a2 ... of symmetric planes, and of planes that
store {0, 1}, whose zero points hold the signs of their scales, 0, a1, a2, a1 + a2 ... A weight goes to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, join, with_base
from llmcompress.methods.solvers.bitplane_fit import PlaneFormat, fit_planes, point_table
from llmcompress.methods.solvers.column_scales import ColumnScales
from llmcompress.methods.solvers.feedback import Projection, feedback
from llmcompress.methods.solvers.grid import GridFormat, grid_sketch
from llmcompress.methods.solvers.hessian import add_damping, channel_energy, inverse_factor, second_moment
from llmcompress.methods.solvers.scales import added_grids, refit_scales
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Dense, Grid, ScaledInputs, Sum, Weight, shape

TURNS = 3  # of scales of rows and factors of columns, fitted to outputs; more gain nothing


class PlaneConfig(StepConfig):
    """The arguments of every method that stores binary planes."""

    group_size: int | None = Field(None, ge=1, description="columns that share scales; null for the whole row")
    rounds: int = Field(15, ge=0, le=100, description="alternations of scales and signs; 0: none, as they start")
    feedback: bool = Field(True, description="columns make up for the errors of those before them (GPTQ)")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")


class ColumnConfig(PlaneConfig):
    """The arguments of methods whose planes may have a factor for every input column as well."""

    columns: bool = Field(False, description="a scale for every input column as well (ARB-RC)")

    def with_columns(self, planes: Weight) -> Weight:
        """Return the planes to store, without values, for `plan` to count their bits."""
        if not self.columns:
            return planes
        return ScaledInputs(planes, torch.empty(shape(planes)[1], dtype=torch.float16, device="meta"))


class Planes:
    """A `Projection` and a `Side`: the nearest points; each group of columns is fitted when the loop reaches it.

    `importance [in]` weights columns in the fit.
    """

    def __init__(self, form: PlaneFormat, width: int, importance: Tensor | None = None) -> None:
        self.form, self.importance = form, importance
        self.group_size = width if form.group_size is None else min(form.group_size, width)
        self.strides: tuple[int, ...] = (self.group_size,)
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.now: list[tuple[Tensor, Tensor, Tensor]] = []  # per group: points in order, midpoints, their codes

    @staticmethod
    def like(grids: Sequence[Grid]) -> Planes:
        """The points of planes that are fitted already, with groups of one size."""
        symmetric, width = grids[0].zero is None, grids[0].codes.shape[1]
        fitted = Planes(PlaneFormat(len(grids), "residual" if symmetric else "grid", grids[0].group_size), width)
        for group in range(grids[0].scale.shape[1]):
            scale = torch.stack([grid.scale[:, group] for grid in grids], 1)
            zeros = [grid.zero[:, group] for grid in grids if grid.zero is not None]
            fitted._add(scale, torch.stack(zeros, 1) if zeros else None)
        return fitted

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Fits the group that starts at `column`."""
        if column % self.group_size == 0:
            part = slice(column, column + self.group_size)
            importance = None if self.importance is None else self.importance[part]
            counted = None if shown is None else shown[part].T
            self._add(*fit_planes(current[part].T.contiguous(), self.form, importance, counted))

    def _add(self, scale: Tensor, zero: Tensor | None) -> None:
        """Parameters `[out, planes]` of the next group."""
        self.scales.append(scale)
        if zero is not None:
            self.zeros.append(zero)
        points, codes = point_table(scale, zero).sort(1)
        self.now.append((points, (points[:, 1:] + points[:, :-1]) / 2, codes))

    def project(self, column: int, values: Tensor) -> Tensor:
        """The nearest points."""
        points, middles, _ = self.now[column // self.group_size]
        place = (values[:, None] > middles).sum(1, keepdim=True)
        return points.gather(1, place)[:, 0]

    def weight(self, values: Tensor) -> Weight:
        """The planes that hold `values [out, in]`, which are such points (others go to the nearest)."""
        codes = []
        for (_, middles, numbers), part in zip(self.now, values.split(self.group_size, 1), strict=True):
            codes.append(numbers.gather(1, torch.searchsorted(middles, part.contiguous())))
        chosen, planes = torch.cat(codes, 1), range(self.form.planes)
        grids = [
            Grid(
                (chosen >> plane & 1).to(torch.uint8),
                torch.stack([scale[:, plane] for scale in self.scales], 1),
                torch.stack([zero[:, plane] for zero in self.zeros], 1) if self.zeros else None,
                2,
                self.group_size,
            )
            for plane in planes
        ]
        return grids[0] if len(grids) == 1 else Sum(tuple(grids))


def planes_of(w: Weight) -> tuple[Grid, ...]:
    """The planes of a sum of them; none of anything else."""
    grids = added_grids(w)
    return grids if all(grid.levels == 2 and (grid.zero is None) == (grids[0].zero is None) for grid in grids) else ()


def planes_sketch(size: tuple[int, int], form: PlaneFormat) -> Weight:
    """Return planes `[out, in]` without values, for `plan` to count their bits."""
    grid = grid_sketch(size, GridFormat(2, form.group_size, form.symmetric))
    return grid if form.planes == 1 else Sum(tuple(replace(grid) for _ in range(form.planes)))


def instead_of_dense(approx: Weight, base: Weight) -> Weight:
    """`base` beside the low-rank term of `approx`. Raises RecipeError where an earlier step made a base."""
    old, term = base_and_term(approx)
    if not isinstance(old, Dense):
        raise RecipeError(f"binary planes store every weight, so they do not go after {describe(old)}; drop one")
    return join(base, term)


def quantize_to_planes(
    layer: Layer, config: PlaneConfig, make: Callable[[Tensor, Tensor], Projection], columns: bool = False
) -> Layer:
    """The layer with its base in the planes of a projection: `make(energy, pivots)`, both `[in]`: the channels' energy,
    and what an error in a column costs less when it is fed back, squared. If scales alternate with signs, they are
    fitted once more at the end, to outputs (ARB-X). With `columns` there are factors of columns as well, fitted in turn
    with the scales.
    """
    config.sketch(layer.approx)
    target = base_target(layer)
    factor, notes = inverse_factor(layer.inputs, config.damping)
    energy, pivots = channel_energy(layer.inputs).float(), factor.diagonal().square()
    projection = ColumnScales(make, energy, pivots, config.rounds) if columns else make(energy, pivots)
    base = feedback(target, factor if config.feedback else None, projection)
    if config.rounds:
        hessian = add_damping(second_moment(layer.inputs), config.damping).float()
        for _ in range(TURNS if columns else 1):
            base = refit_scales(base, target, hessian)
    return with_base(layer, base, notes)
