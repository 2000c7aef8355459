"""Projections of the feedback loop: to kept values, zeros, grid points, floats, or a selection of two of these."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.kernels.column_block import GridBlock
from llmcompress.methods.solvers.block_search import round_columns
from llmcompress.methods.solvers.feedback import Projection
from llmcompress.methods.solvers.floats import FloatLayout, codes_of, fit_scales, float_sketch, points_of, tensor_factor
from llmcompress.methods.solvers.grid import GridFormat, centre, fit_grid, grid_of, grid_sketch, reciprocal
from llmcompress.weight.expression import float_steps
from llmcompress.weight.nodes import Columns, Dense, Grid, Index, Minifloat, Weight, Where, Zero, shape


class KeptValues:
    """Values as they are, stored in `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.strides: tuple[int, ...] = (1,)

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Nothing to fit."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """Rounded to the storage type, so that its error is fed back too."""
        return values.to(self.dtype).float()

    def weight(self, values: Tensor) -> Weight:
        """`Dense`."""
        return Dense(values.to(self.dtype))


class PrunedValues:
    """Values as they are in bfloat16 where a selection is true, 0 elsewhere; see `Selection` for the arguments."""

    def __init__(self, choose: Callable[[Tensor, int], Tensor], span: int, index: Callable[..., Index]) -> None:
        self.choose, self.span, self.index = choose, span, index
        self.strides: tuple[int, ...] = (span,)
        self.chosen = torch.zeros(0, 0)  # float32 [in, out], 1 where values stay

    def project_block(self, columns: slice, current: Tensor, shares: Tensor | None) -> Tensor:
        """See `BlockProjection`: a call of `round_columns` for each run of columns of one selection."""
        if columns.start == 0:
            self.chosen = torch.zeros_like(current)
        block = current[columns]
        errors = torch.empty_like(block)
        for first in range(0, len(block), self.span):
            start = columns.start + first
            if start % self.span == 0:  # else a selection of more columns than a block goes on
                whole = slice(start, start + self.span)
                self.chosen[whole] = self.choose(current[whole], start).float()
            chosen = self.chosen[start : min(start + self.span, columns.stop)]
            rest = None if shares is None else shares[first:, first:]
            _prune_columns(block[first:], chosen, rest, errors[first:])
        return errors

    def weight(self, values: Tensor) -> Weight:
        """`Where`."""
        kept, size = self.chosen.T.bool().contiguous(), (values.shape[0], values.shape[1])
        return Where(self.index(kept), Dense(values.to(torch.bfloat16)), Zero(size))


def keep_places(pruned: Where) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Return the function that keeps values where a pruned matrix has them; see `TrellisStreams.choose`."""
    places = pruned.index.inside.expand(shape(pruned)).T.float().contiguous()

    def choose(start: int, current: Tensor, shares: Tensor, before: Tensor) -> Tensor:
        errors = torch.empty_like(current)
        _prune_columns(current, places[start : start + len(current)], shares, errors, before)
        return errors

    return choose


def _prune_columns(
    block: Tensor, chosen: Tensor, shares: Tensor | None, errors: Tensor, before: Tensor | None = None
) -> None:
    """Keep the first columns of a block where `chosen` is 1, and move the later ones."""
    groups = torch.arange(len(chosen), dtype=torch.int32, device=block.device)
    rest = None if shares is None else shares.contiguous()
    round_columns(GridBlock(block, (chosen, chosen, chosen), groups, 0, rest, before), errors)


class Zeros:
    """Zeros."""

    strides: tuple[int, ...] = (1,)

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Nothing to fit."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """Zeros `[out]`."""
        return torch.zeros_like(values)

    def weight(self, values: Tensor) -> Weight:
        """`Zero`."""
        return Zero((values.shape[0], values.shape[1]))


class GridPoints:
    """Grid points; each group of columns is fitted when the loop reaches it.

    `importance [in]` weights columns in the fit. With `order`, all groups are fitted at the start (static groups), so
    that reordered columns keep the group of their place and no index is stored.
    """

    def __init__(
        self, form: GridFormat, width: int, importance: Tensor | None = None, order: Tensor | None = None
    ) -> None:
        self.form = replace(form, group_size=form.group(width))
        self.group_size = form.group(width)
        self.strides: tuple[int, ...] = (self.group_size if order is None else 1,)
        self.importance, self.order = importance, order
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.now: list[tuple[Tensor, Tensor, Tensor]] = []  # per group: 1 / scale, centre, scale; each [out]

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Fit the group that starts at `column`, or all of them at the first."""
        if self.order is not None:
            if column == 0:
                original = current[self.order.argsort()]
                for start in range(0, len(current), self.group_size):
                    self._fit(original, start, None)
        elif column % self.group_size == 0:
            self._fit(current, column, shown)

    @staticmethod
    def like(grid: Grid) -> "GridPoints":
        """The points of a grid that is fitted already."""
        fitted = GridPoints(GridFormat(grid.levels, grid.group_size, grid.zero is None), grid.codes.shape[1])
        rows = len(grid.codes)  # of one scale, where they share it
        for group in range(grid.scale.shape[1]):
            part = slice(group, group + 1)
            zero = None if grid.zero is None else grid.zero[:, part].expand(rows, 1)
            fitted._add(grid.scale[:, part].expand(rows, 1), zero)
        return fitted

    def _fit(self, current: Tensor, start: int, shown: Tensor | None) -> None:
        columns = slice(start, start + self.group_size)
        importance = None if self.importance is None else self.importance[columns]
        values, counted = current[columns].T.contiguous(), None if shown is None else shown[columns].T
        self._add(*fit_grid(values, self.form, importance, counted))

    def _add(self, scale: Tensor, zero: Tensor | None) -> None:
        """Parameters `[out, 1]` of the next group."""
        self.scales.append(scale)
        if zero is not None:
            self.zeros.append(zero)
        middle = torch.zeros_like(scale, dtype=torch.float32) + centre(zero, self.form.levels)
        self.now.append((reciprocal(scale)[:, 0], middle[:, 0], scale[:, 0].float()))

    def project(self, column: int, values: Tensor) -> Tensor:
        """The nearest grid points."""
        place = column if self.order is None else int(self.order[column])
        inverse, middle, scale = self.now[place // self.group_size]
        codes = torch.addcmul(middle, values, inverse).round_().clamp_(0, self.form.levels - 1)
        return codes.sub_(middle).mul_(scale)

    def project_block(self, columns: slice, current: Tensor, shares: Tensor | None) -> Tensor:
        """See `BlockProjection`: a call of `round_columns` for each run of columns before the next fit."""
        block, count = current[columns], columns.stop - columns.start
        errors = torch.empty_like(block)
        stride = count if self.order is not None else self.group_size
        start = 0
        while start < count:
            column = columns.start + start
            self.begin(column, current)
            stop = min(count, start + stride - column % stride) if self.order is None else count
            part = slice(start, stop)
            self._round(part, columns.start, block, None if shares is None else shares[start:, start:], errors)
            start = stop
        return errors

    @cached_property
    def fitted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters of all groups after the fits: 1 / scale, centre, scale; `[groups, out]` each."""
        inverse, middle, scale = (torch.stack(each) for each in zip(*self.now, strict=True))
        return inverse, middle, scale

    def choose(self, start: int, current: Tensor, shares: Tensor, before: Tensor) -> Tensor:
        """Round columns from `start` on, under fitted scales; see `TrellisStreams.choose`."""
        places = torch.arange(start, start + len(current), dtype=torch.int32, device=current.device)
        groups, errors = places // self.group_size, torch.empty_like(current)
        block = GridBlock(current, self.fitted, groups, self.form.levels, shares.contiguous(), before)
        round_columns(block, errors)
        return errors

    def _round(self, part: slice, first: int, block: Tensor, shares: Tensor | None, errors: Tensor) -> None:
        """Round some columns of a block that starts at column `first`, and move the later ones."""
        if self.order is None:  # they are of one group, the last that was fitted
            inverse, middle, scale = (each[None] for each in self.now[-1])
            parameters = inverse, middle, scale
            groups = torch.zeros(part.stop - part.start, dtype=torch.int32, device=block.device)
        else:
            parameters = self.fitted
            groups = (self.order[first + part.start : first + part.stop] // self.group_size).int()
        rest = None if shares is None else shares.contiguous()
        own = GridBlock(block[part.start :], parameters, groups, self.form.levels, rest)
        round_columns(own, errors[part.start :])

    def weight(self, values: Tensor) -> Weight:
        """The `Grid`."""
        zero = torch.cat(self.zeros, 1) if self.zeros else None
        return grid_of(values, torch.cat(self.scales, 1), zero, self.form.levels, self.group_size)


class FloatPoints:
    """Floats of few bits; the scale of each group of columns is fitted when the loop reaches it.

    Arguments as of `GridPoints`. A scale of all rows and the factor of a matrix are fitted at the first column.
    """

    def __init__(
        self, layout: FloatLayout, width: int, importance: Tensor | None = None, order: Tensor | None = None
    ) -> None:
        self.layout, self.group_size = layout, layout.group(width)
        self.strides: tuple[int, ...] = (self.group_size if order is None else 1,)
        self.importance, self.order = importance, order
        self.factor: Tensor | None = None
        self.scales: list[Tensor] = []
        self.steps: list[Tensor] = []  # per group: its scale times the factor, float32 [out or 1]

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Fit the group that starts at `column`, or all of them at the first."""
        if column == 0:
            self.factor = tensor_factor(current.abs().max(), self.layout)
            if self.order is not None:
                self._fit(current[self.order.argsort()], self.importance)
        if self.order is None and column % self.group_size == 0:
            columns = slice(column, column + self.group_size)
            importance = None if self.importance is None else self.importance[columns]
            self._fit(current[columns] if shown is None else current[columns] * shown[columns], importance)

    @staticmethod
    def like(floats: Minifloat) -> "FloatPoints":
        """The numbers under scales that are fitted already."""
        fitted = FloatPoints(FloatLayout(floats.form, floats.scales, floats.group_size), floats.codes.shape[1])
        fitted.factor = floats.tensor_scale
        fitted._add(floats.scale, float_steps(floats))
        return fitted

    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        """Scales of the groups in whole columns, `values [columns, out]`."""
        self._add(*fit_scales(values.T.contiguous(), self.layout, self.factor, importance))

    def _add(self, scales: Tensor, steps: Tensor) -> None:
        """Scales of the next groups, as they are stored and as they multiply, `[out or 1, groups]`."""
        self.scales.append(scales)
        self.steps += steps.unbind(1)

    def project(self, column: int, values: Tensor) -> Tensor:
        """The nearest floats."""
        place = column if self.order is None else int(self.order[column])
        return points_of(values, self.layout.form, self.steps[place // self.group_size])

    def weight(self, values: Tensor) -> Weight:
        """The `Minifloat`."""
        codes = codes_of(values, self.layout.form, torch.stack(self.steps, 1), self.group_size)
        scale = torch.cat(self.scales, 1)
        return Minifloat(codes, scale, self.factor, self.layout.form, self.layout.scales, self.group_size)


def points_of_form(
    form: GridFormat | FloatLayout, width: int, importance: Tensor | None = None, order: Tensor | None = None
) -> GridPoints | FloatPoints:
    """The projection to a form; arguments as of `GridPoints`."""
    return (GridPoints if isinstance(form, GridFormat) else FloatPoints)(form, width, importance, order)  # type: ignore[arg-type]


def form_sketch(shape: tuple[int, int], form: GridFormat | FloatLayout) -> Weight:
    """Return a matrix of that form without values, for `plan` to count its bits."""
    return grid_sketch(shape, form) if isinstance(form, GridFormat) else float_sketch(shape, form)


class Side(Projection, Protocol):
    """One side of a selection."""

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """See `Projection.begin`; `shown [in, out]` is true where this side is stored."""


class Selection:
    """`inside` where a selection is true, `outside` elsewhere.

    `choose(columns [span, out], first column)` returns the selection for every `span` columns, on weights that carry
    the feedback of earlier ones. `index(selection [out, in])` stores it.
    """

    def __init__(
        self,
        inside: Side,
        outside: Side,
        choose: Callable[[Tensor, int], Tensor],
        span: int,
        index: Callable[..., Index],
    ) -> None:
        self.inside, self.outside, self.choose, self.span, self.index = inside, outside, choose, span, index
        # every span and every group must start on up-to-date weights, and a group needs its selection made
        self.strides = (span, *inside.strides, *outside.strides)
        self.stride = max(self.strides)
        self.chosen = self.others = torch.zeros(0, 0, dtype=torch.bool)

    def begin(self, column: int, current: Tensor) -> None:
        """Choose for the stride that starts at `column`, then let both sides fit to what they store."""
        if column == 0:
            self.chosen = torch.zeros(current.shape, dtype=torch.bool, device=current.device)
            self.others = torch.zeros_like(self.chosen)
        if column % self.stride == 0:
            first = -(-column // self.span) * self.span  # a span that began before this stride is chosen already
            for start in range(first, min(column + self.stride, len(current)), self.span):
                self._choose(current, start)
        elif column % self.span == 0:
            self._choose(current, column)
        self.inside.begin(column, current, self.chosen)
        self.outside.begin(column, current, self.others)

    def _choose(self, current: Tensor, start: int) -> None:
        columns = slice(start, start + self.span)
        self.chosen[columns] = self.choose(current[columns], start)
        self.others[columns] = ~self.chosen[columns]

    def project(self, column: int, values: Tensor) -> Tensor:
        """Each side's values where it is selected."""
        inside, outside = self.inside.project(column, values), self.outside.project(column, values)
        return torch.where(self.chosen[column], inside, outside)

    def weight(self, values: Tensor) -> Weight:
        """`Where`."""
        chosen = self.chosen.T.contiguous()
        return Where(self.index(chosen), self.inside.weight(values), self.outside.weight(values))


def columns(chosen: Tensor) -> Index:
    """Return the column set of `chosen [out, in]`, whose rows are all the same."""
    return Columns(chosen[0].clone())


def largest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of all `scores`, exactly; ties go to the first."""
    flat = scores.reshape(-1)
    if count <= 0 or count >= len(flat):
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    smallest = flat.kthvalue(len(flat) - count + 1).values  # of those chosen; several may be as small
    chosen = flat > smallest
    ties = (flat == smallest).nonzero()[: count - int(chosen.sum())]
    chosen[ties] = True
    return chosen.reshape(scores.shape)


def largest_of_each(scores: Tensor, kept: int, group: int) -> Tensor:
    """True at the `kept` largest of every `group` consecutive rows of `scores [in, out]`; ties go to the first."""
    grouped = scores.reshape(-1, group, scores.shape[1])
    chosen = grouped >= grouped.kthvalue(group - kept + 1, dim=1, keepdim=True).values
    if int(chosen.count_nonzero()) > kept * (grouped.numel() // group):  # ties; rare, and sorting is slow
        ranked = grouped.argsort(dim=1, descending=True, stable=True)[:, :kept]
        chosen = torch.zeros_like(chosen).scatter_(1, ranked, True)
    return chosen.reshape(scores.shape)
