"""Binary planes: a bit a weight in each of several binary grids, fitted to groups of weights and stored as their sum.

The grids' scales, of one row and group, make `2^planes` points: +-a1 +-a2 ... of symmetric planes, and of planes that
store {0, 1}, whose zero points hold the signs of their scales, 0, a1, a2, a1 + a2 ... A weight goes to the nearest.

Rows are fitted one by one, on their sorted weights: the weights nearest to one point are then a run, whose sums are two
differences of running sums. So after one sort an alternation of signs and scales (ARB, arXiv 2410.03129) costs next to
nothing, and the best split of magnitudes in two (BiLLM, arXiv 2402.04291) is found by trying all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.layer import Layer, StepConfig, base_target, with_base
from llmcompress.methods.solvers.feedback import Projection, feedback
from llmcompress.methods.solvers.grid import GridFormat, fit_grid, float16_scale, grid_sketch
from llmcompress.methods.solvers.hessian import channel_energy, inverse_factor, metric
from llmcompress.methods.solvers.scales import ColumnScales, added_grids, refit_scales
from llmcompress.weight.nodes import Grid, ScaledInputs, Sum, Weight, shape

ROWS = 1024  # fitted at once; sorted weights and their sums take 28 bytes a weight
TURNS = 3  # of scales of rows and factors of columns, fitted to outputs; more gain nothing


@dataclass(frozen=True)
class PlaneFormat:
    """The form of binary planes, and how they are fitted.

    `start`: `residual` binarizes the error of the planes before; `split` begins with the two planes that give weights
    of small and of large magnitude the best levels +-a and +-b, then goes on as `residual`; `grid` takes the planes of
    an asymmetric integer grid. `rounds`: alternations of least-squares scales and nearest points that follow.
    """

    planes: int
    start: Literal["residual", "split", "grid"] = "residual"
    group_size: int | None = None  # input columns that share scales; None for the whole row
    rounds: int = 0

    @property
    def symmetric(self) -> bool:
        """True if planes store +-scale/2, not {0, 1} times a scale with a sign."""
        return self.start != "grid"


class PlaneConfig(StepConfig):
    """Arguments of every method that stores binary planes."""

    group_size: int | None = Field(None, ge=1, description="columns that share scales; null for the whole row")
    rounds: int = Field(15, ge=0, le=100, description="alternations of scales and signs; 0: none, as they start")
    feedback: bool = Field(True, description="columns make up for the errors of those before them (GPTQ)")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")


class ColumnConfig(PlaneConfig):
    """Arguments of methods whose planes may have a factor for every input column as well."""

    columns: bool = Field(False, description="a scale for every input column as well (ARB-RC)")

    def with_columns(self, planes: Weight) -> Weight:
        """Return the planes to store, without values, for `plan` to count their bits."""
        if not self.columns:
            return planes
        return ScaledInputs(planes, torch.empty(shape(planes)[1], dtype=torch.float16, device="meta"))


class Planes:
    """A `Side`: points of binary planes; each group of columns is fitted when the loop reaches it.

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
        """Return the points of fitted planes, with groups of one size."""
        symmetric, width = grids[0].zero is None, grids[0].codes.shape[1]
        fitted = Planes(PlaneFormat(len(grids), "residual" if symmetric else "grid", grids[0].group_size), width)
        for group in range(grids[0].scale.shape[1]):
            scale = torch.stack([grid.scale[:, group] for grid in grids], 1)
            zeros = [grid.zero[:, group] for grid in grids if grid.zero is not None]
            fitted._add(scale, torch.stack(zeros, 1) if zeros else None)
        return fitted

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Fit the group that starts at `column`."""
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
        """Return the planes that hold `values [out, in]`, each at the nearest point."""
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
    """Return the planes of a sum of planes; none for anything else."""
    grids = added_grids(w)
    return grids if all(grid.levels == 2 and (grid.zero is None) == (grids[0].zero is None) for grid in grids) else ()


def planes_sketch(size: tuple[int, int], form: PlaneFormat) -> Weight:
    """Return planes `[out, in]` without values, for `plan` to count their bits."""
    grid = grid_sketch(size, GridFormat(2, form.group_size, form.symmetric))
    return grid if form.planes == 1 else Sum(tuple(replace(grid) for _ in range(form.planes)))


def quantize_to_planes(
    layer: Layer, config: PlaneConfig, make: Callable[[Tensor, Tensor], Projection], columns: bool = False
) -> Layer:
    """Return the layer with its base in the planes of a projection, `make(energy, pivots)`.

    `energy [in]`: of the channels; `pivots [in]`: U_jj^2 of the feedback. If scales alternate with signs, they are
    fitted once more at the end, to outputs (ARB-X). With `columns` there are factors of columns, fitted in turn with
    the scales.
    """
    config.sketch(layer.approx)
    target = base_target(layer)
    factor, notes = inverse_factor(layer.inputs, config.damping)
    energy, pivots = channel_energy(layer.inputs).float(), factor.diagonal().square()
    projection = ColumnScales(make, energy, pivots, config.rounds) if columns else make(energy, pivots)
    base = feedback(target, factor if config.feedback else None, projection)
    if config.rounds:
        hessian = metric(layer.inputs, target, config.damping)
        for _ in range(TURNS if columns else 1):
            base = refit_scales(base, target, hessian)
    return with_base(layer, base, notes)


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_planes(
    weight: Tensor, form: PlaneFormat, importance: Tensor | None = None, shown: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scales float16 and zero points uint8 (None if symmetric), `[rows, planes]`, for `weight [rows, columns]`.

    They leave the least squared error, columns weighted by `importance [columns]`; only entries with
    `shown [rows, columns]` count. Raises NumericsError for a scale outside float16.
    """
    parts = []
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        counted = torch.ones_like(weight[rows]) if importance is None else importance.expand_as(weight[rows])
        if shown is not None:
            counted = counted * shown[rows]
        parts.append(_fit(weight[rows], form, counted, None if shown is None else shown[rows], importance))
    scale = torch.cat([scale for scale, _ in parts])
    zeros = [zero for _, zero in parts if zero is not None]
    return scale, torch.cat(zeros) if zeros else None


def squared_error(weight: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None = None) -> Tensor:
    """Return the squared error `[rows]` of the nearest points, columns weighted by `importance`; float64."""
    counted = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    energy = (weight.double().square() * counted).sum(1)
    return energy + _SortedRows.of(weight, counted).loss(point_table(scale, zero))


def point_table(scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the points `[rows, 2^planes]`, float32, summed as by `dense`; bit k of a number: the code in plane k."""
    codes = _codes(scale.shape[1], scale.device)
    middle = 0.5 if zero is None else zero.float()[:, :, None]
    return reduce(torch.add, ((codes - middle) * scale.float()[:, :, None]).unbind(1))


def _codes(planes: int, device: torch.device) -> Tensor:
    """Return the bits of all numbers, float32 `[planes, 2^planes]`."""
    return (torch.arange(1 << planes, device=device) >> torch.arange(planes, device=device)[:, None] & 1).float()


def _fit(
    weight: Tensor, form: PlaneFormat, counted: Tensor, shown: Tensor | None, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    zero: Tensor | None = None
    match form.start:
        case "residual":
            scale = float16_scale(_residual_scales(weight, form.planes, counted))
        case "split":
            scale = float16_scale(_split_scales(weight, form.planes, counted))
        case "grid":
            step, middle = fit_grid(weight, GridFormat(1 << form.planes, symmetric=False), importance, shown)
            powers = torch.arange(form.planes, device=weight.device)
            scale = float16_scale(step.float() * (1 << powers))
            if middle is not None:
                zero = middle >> powers.to(torch.uint8) & 1
    if form.rounds == 0:
        return scale, zero
    return _alternate(_SortedRows.of(weight, counted), scale, zero, form.rounds), zero


def _residual_scales(weight: Tensor, planes: int, counted: Tensor) -> Tensor:
    """Return twice the mean magnitude of the error of the planes before, `[rows, planes]`."""
    total = counted.sum(1, keepdim=True).clamp_min(1e-30)
    left, scales = weight, []
    for _ in range(planes):
        level = (left.abs() * counted).sum(1, keepdim=True) / total
        scales.append(2 * level)
        left = left - torch.where(left > 0, level, -level)
    return torch.cat(scales, 1)


def _split_scales(weight: Tensor, planes: int, counted: Tensor) -> Tensor:
    """Return scales `[rows, planes]` of two planes with the best points +-a and +-b, then of residual ones."""
    if planes == 1:
        return _residual_scales(weight, 1, counted)
    first = _SortedRows.of(weight.abs(), counted).split_scales().float()
    left = weight.abs()
    for level in (first / 2).unbind(1):
        left = (left - level[:, None]).abs()
    return torch.cat([first, _residual_scales(left, planes - 2, counted)], 1) if planes > 2 else first


def _alternate(rows: _SortedRows, scale: Tensor, zero: Tensor | None, rounds: int) -> Tensor:
    """Return scales after `rounds` of least-squares scales and nearest points; a row keeps its best."""
    best = rows.loss(point_table(scale, zero))
    for _ in range(rounds):
        wanted = rows.least_squares(scale, zero)
        tried = wanted.clamp_max(torch.finfo(torch.float16).max).to(torch.float16)
        loss = rows.loss(point_table(tried, zero))
        better = loss < best
        if not bool(better.any()):
            break
        best = torch.where(better, loss, best)
        scale = torch.where(better[:, None], tried, scale)
    return scale


@dataclass(frozen=True)
class _SortedRows:
    """Weights of a row from the smallest to the largest, and running sums over them, float64."""

    values: Tensor  # [rows, columns]
    counts: Tensor  # [rows, 1 + columns]: of importances
    sums: Tensor  # alike: of importances times weights

    @staticmethod
    def of(weight: Tensor, counted: Tensor) -> _SortedRows:
        """Sort `weight [rows, columns]`; `counted`: the importance of each entry."""
        values, order = weight.sort(1)
        counts = counted.gather(1, order).double()
        before = counts.new_zeros(len(counts), 1)
        sums = torch.cat([before, (counts * values).cumsum(1)], 1)
        return _SortedRows(values, torch.cat([before, counts.cumsum(1)], 1), sums)

    def cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums of importances, and of importances times weights, over the weights nearest to each point.

        `points [rows, points]` ascend; the sums have their shape.
        """
        edges = torch.searchsorted(self.values, (points[:, 1:] + points[:, :-1]) / 2, right=True)
        first, last = edges.new_zeros(len(edges), 1), edges.new_full((len(edges), 1), self.values.shape[1])
        edges = torch.cat([first, edges, last], 1)
        return self.counts.gather(1, edges).diff(dim=1), self.sums.gather(1, edges).diff(dim=1)

    def loss(self, points: Tensor) -> Tensor:
        """Return the squared error `[rows]` of the nearest points, less that of zeros."""
        points = points.sort(1).values
        counts, sums = self.cells(points)
        exact = points.double()
        return (exact * (counts * exact - 2 * sums)).sum(1)

    def least_squares(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the best scales `[rows, planes]`, float64, for the codes that are nearest under the given ones.

        A negative scale of a symmetric plane means that all its codes flip. Planes with zero points get none: weights
        nearest to a higher point have a higher mean.
        """
        points, order = point_table(scale, zero).sort(1)
        counts, sums = self.cells(points)
        middle = 0.5 if zero is None else zero[:, :, None].double()
        table = (_codes(scale.shape[1], scale.device).double() - middle).expand(len(scale), -1, -1)
        ordered = table.gather(2, order[:, None].expand_as(table))  # [rows, planes, points]
        gram = (ordered * counts[:, None]) @ ordered.mT
        pull = ordered @ (sums - counts * points)[:, :, None]  # of the error that is left: where nothing pulls, stay
        ridge = gram.diagonal(dim1=1, dim2=2).sum(1) * 1e-9
        ridge = torch.where(ridge > 0, ridge, 1.0)[:, None, None] * torch.eye(scale.shape[1], device=scale.device)
        found = scale.double() + torch.linalg.solve(gram + ridge, pull)[:, :, 0]
        return found.abs()

    def split_scales(self) -> Tensor:
        """Return the scales `[rows, 2]` of two planes whose points +-a and +-b lose least, for sorted magnitudes.

        All places to split the order in two are tried, each side at its mean.
        """
        counts, sums = self.counts, self.sums
        others, rest = counts[:, -1:] - counts, sums[:, -1:] - sums
        small, large = _mean(sums, counts), _mean(rest, others)
        best = (small * sums + large * rest).argmax(1, keepdim=True)
        a, b = small.gather(1, best), large.gather(1, best)
        return torch.cat([a + b, (b - a).abs()], 1)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts > 0, sums / counts.clamp_min(1e-300), 0.0)
