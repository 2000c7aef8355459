"""Fitting the scales of binary planes to a group of weights.

Rows are fitted by themselves, on their sorted weights: the weights nearest to one point are then a run, whose sums are
two differences of running sums. So after one sort an alternation of signs and scales (ARB, arXiv 2410.03129) costs next
to nothing, and the best split of magnitudes in two (BiLLM, arXiv 2402.04291) is found by looking at all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from llmcompress.methods.solvers.grid import GridFormat, fit_grid, float16_scale

ROWS = 1024  # fitted at once; sorted weights and their sums take 28 bytes a weight


@dataclass(frozen=True)
class PlaneFormat:
    """The form of binary planes, and how they are fitted.

    `start`: `residual` binarizes what the planes before leave; `split` begins with the two planes that give weights of
    small and of large magnitude the levels +-a and +-b that lose least, and goes on like that; `grid` takes the planes
    of an asymmetric integer grid of two or more bits, exactly. `rounds`: alternations of least-squares scales and
    nearest points that follow, none of which loses.
    """

    planes: int
    start: Literal["residual", "split", "grid"] = "residual"
    group_size: int | None = None  # input columns that share scales; None for the whole row
    rounds: int = 0

    @property
    def symmetric(self) -> bool:
        """True if planes store +-scale/2, not {0, 1} times a scale with a sign."""
        return self.start != "grid"


def fit_planes(
    weight: Tensor, form: PlaneFormat, importance: Tensor | None = None, shown: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scales float16 `[rows, planes]` and zero points uint8 alike (None if symmetric) for `weight [rows, columns]`.

    Least squared error, each column weighted by `importance [columns]`; only entries with `shown [rows, columns]`
    count. Raises NumericsError for a scale outside float16.
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
    """The squared error `[rows]` that the nearest points leave, each column weighted by `importance`; float64."""
    counted = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    energy = (weight.double().square() * counted).sum(1)
    return energy + _SortedRows.of(weight, counted).loss(point_table(scale, zero))


def point_table(scale: Tensor, zero: Tensor | None) -> Tensor:
    """The points `[rows, 2^planes]`, float32, added up as `weight.dense` does; bit k of a point's number is its code
    in plane k."""
    codes = _codes(scale.shape[1], scale.device)
    middle = 0.5 if zero is None else zero.float()[:, :, None]
    return reduce(torch.add, ((codes - middle) * scale.float()[:, :, None]).unbind(1))


def _codes(planes: int, device: torch.device) -> Tensor:
    """The bits of all numbers, float32 `[planes, 2^planes]`."""
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
    """Twice the mean magnitude of what the planes before left, `[rows, planes]`."""
    total = counted.sum(1, keepdim=True).clamp_min(1e-30)
    left, scales = weight, []
    for _ in range(planes):
        level = (left.abs() * counted).sum(1, keepdim=True) / total
        scales.append(2 * level)
        left = left - torch.where(left > 0, level, -level)
    return torch.cat(scales, 1)


def _split_scales(weight: Tensor, planes: int, counted: Tensor) -> Tensor:
    """Scales `[rows, planes]` of two planes with the best points +-a and +-b, and of residual ones after them."""
    if planes == 1:
        return _residual_scales(weight, 1, counted)
    first = _SortedRows.of(weight.abs(), counted).split_scales().float()
    left = weight.abs()
    for level in (first / 2).unbind(1):
        left = (left - level[:, None]).abs()
    return torch.cat([first, _residual_scales(left, planes - 2, counted)], 1) if planes > 2 else first


def _alternate(rows: _SortedRows, scale: Tensor, zero: Tensor | None, rounds: int) -> Tensor:
    """Least-squares scales and nearest points in turn; a row keeps the best it had."""
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
        """Of `weight [rows, columns]`; an entry counts as much as `counted` says."""
        values, order = weight.sort(1)
        counts = counted.gather(1, order).double()
        before = counts.new_zeros(len(counts), 1)
        sums = torch.cat([before, (counts * values).cumsum(1)], 1)
        return _SortedRows(values, torch.cat([before, counts.cumsum(1)], 1), sums)

    def cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums over the weights nearest to each of `points [rows, points]`, which ascend.

        The sums are of importances and of importances times weights, each `[rows, points]`.
        """
        edges = torch.searchsorted(self.values, (points[:, 1:] + points[:, :-1]) / 2, right=True)
        first, last = edges.new_zeros(len(edges), 1), edges.new_full((len(edges), 1), self.values.shape[1])
        edges = torch.cat([first, edges, last], 1)
        return self.counts.gather(1, edges).diff(dim=1), self.sums.gather(1, edges).diff(dim=1)

    def loss(self, points: Tensor) -> Tensor:
        """The squared error `[rows]` of the nearest points, less that of zeros."""
        points = points.sort(1).values
        counts, sums = self.cells(points)
        exact = points.double()
        return (exact * (counts * exact - 2 * sums)).sum(1)

    def least_squares(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The best scales `[rows, planes]`, float64, for the codes that are nearest under the given ones.

        Of symmetric planes a negative scale means that all codes of the plane turn round. Two planes with zero points
        have none: what is nearest to a higher point is higher, and so is its mean.
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
        """For sorted magnitudes: the scales `[rows, 2]` of two planes whose points +-a and +-b lose least.

        Of all places to split the order in two, each side then at its mean (two means in one dimension, exactly).
        """
        counts, sums = self.counts, self.sums
        others, rest = counts[:, -1:] - counts, sums[:, -1:] - sums
        small, large = _mean(sums, counts), _mean(rest, others)
        best = (small * sums + large * rest).argmax(1, keepdim=True)
        a, b = small.gather(1, best), large.gather(1, best)
        return torch.cat([a + b, (b - a).abs()], 1)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts > 0, sums / counts.clamp_min(1e-300), 0.0)
