"""Coordinate descent on what is stored, and least squares for its scales: a polish after any base.

Minimises tr(E H E^T), which error feedback does only greedily. A column may move again, to the stored values nearest to
`q_j + (E H)_j / H_jj`, now that all other columns are known, later ones too. Then scales are fitted by least squares,
those of each row and group in turn. No move raises the loss on the calibration inputs; where rows do not count alike,
no move of a column of a trellis raises the sum of what they count.

Stores the same expression in the same bits. It may change grid codes, codes of floats, streams of a trellis, bits of
binary planes, factors of columns, kept values of a pruned matrix, signs of a partially binarized one, codes and entries
of codebooks, and the codes and signs of llama.cpp's IQ types, of which IQ4_XS becomes IQ4_NL. Masks, selections, and
the scales of floats, of types with tables and of groups along the output stay. The scheme is that of AQLM's code
updates (arXiv 2401.06118), one weight, one vector, or one column of a trellis at a time.
"""

from collections.abc import Callable
from typing import Literal, TypeGuard

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, method, with_base
from llmcompress.methods.solvers.bitplanes import Planes, planes_of
from llmcompress.methods.solvers.block_search import TrellisStreams
from llmcompress.methods.solvers.feedback import few_threads
from llmcompress.methods.solvers.grid import IQ4, IQ4_LEVELS, grid_of, round_to
from llmcompress.methods.solvers.hessian import metric
from llmcompress.methods.solvers.projection import FloatPoints, GridPoints, KeptValues, Zeros, keep_places
from llmcompress.methods.solvers.scales import divide_columns, refit_scales
from llmcompress.methods.solvers.superblocks import visit_superblocks
from llmcompress.methods.solvers.vectors import books_of, move_codebooks, visit_vectors
from llmcompress.runtime.phases import phase
from llmcompress.weight.expression import dense, describe, repeat_groups
from llmcompress.weight.nodes import (
    Codebook,
    Dense,
    Grid,
    Minifloat,
    ScaledInputs,
    Sum,
    Superblocks,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    rebuild,
    shape,
)

BLOCK = 64  # columns whose moves are gathered into one product; changes speed, never the result


class Refine(StepConfig):
    """Arguments of `refine`."""

    method: Literal["refine"] = "refine"
    passes: int = Field(2, ge=1, le=100, description="times every column is visited")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = ({}, {"passes": 4})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        _compressed_base(approx)
        return approx

    def rough(self) -> None:
        """Nothing; see `StepConfig.rough`."""


@method("refine", Refine, needs={"outer"}, data_free=True, rowwise=True)
@phase("refine")
def refine(layer: Layer, config: Refine) -> Layer:
    """The base with better stored values, in the same bits."""
    base, target = _compressed_base(layer.approx), base_target(layer)
    hessian = metric(layer.inputs, target, config.damping)
    for _ in range(config.passes):
        base = refit_scales(descend(base, target, hessian, layer.rows), target, hessian)
    return with_base(layer, base)


def descend(base: Weight, target: Tensor, hessian: Tensor, rows: Tensor | None = None) -> Weight:
    """Return `base` after one visit to every column of `target [out, in]`, left to right, under `hessian [in, in]`.

    `rows [out]`: their importance where a column is chosen as a whole.
    """
    base = move_codebooks(base, target, lambda books, own, shown: visit_vectors(books, own, hessian, shown))
    if books_of(base):
        return base
    if isinstance(base, Superblocks):
        return visit_superblocks(base, target, hessian)
    values = dense(base).T.clone(memory_format=torch.contiguous_format)  # [in, out], like everything below
    pull = hessian @ (target.T - values)
    if isinstance(base, TrellisCodes):
        streams = TrellisStreams.of(base, rows)
        _descend_blocks(streams.choose, values, pull, hessian)
        return streams.weight(values.T)
    if isinstance(base, Grid) and base.levels != IQ4_LEVELS:
        _descend_blocks(GridPoints.like(base).choose, values, pull, hessian)
        return with_values(base, values.T.contiguous())
    if _is_pruned(base):
        _descend_blocks(keep_places(base), values, pull, hessian)
        return with_values(base, values.T.contiguous())
    move_to = nearest(base)
    for start in range(0, len(values), BLOCK):
        stop = min(start + BLOCK, len(values))
        moves = torch.empty_like(values[start:stop])
        with few_threads(values.shape[1]):
            for column in range(start, stop):
                stored = move_to(column, values[column] + pull[column] / hessian[column, column])
                move = torch.sub(stored, values[column], out=moves[column - start])
                values[column] = stored
                pull[column + 1 : stop].addr_(hessian[column + 1 : stop, column], move, alpha=-1)
        # rows before `stop` are not read again in this visit
        pull[stop:].addmm_(hessian[stop:, start:stop], moves, alpha=-1)
    return with_values(base, values.T.contiguous())


def _is_pruned(w: Weight) -> TypeGuard[Where]:
    """True if a matrix is bfloat16 where an index says so, and 0 elsewhere."""
    if not isinstance(w, Where) or not isinstance(w.outside, Zero):
        return False
    return isinstance(w.inside, Dense) and w.inside.values.dtype == torch.bfloat16


def _descend_blocks(
    choose: Callable[[int, Tensor, Tensor, Tensor], Tensor], values: Tensor, pull: Tensor, hessian: Tensor
) -> None:
    """Move `values [in, out]` a block of columns at a time; `pull [in, out]`: the error times `hessian`.

    `choose(first column, wanted, shares, before)` overwrites `wanted` with the stored values and returns the moves.
    """
    for start in range(0, len(values), BLOCK):
        part, stop = slice(start, start + BLOCK), min(start + BLOCK, len(values))
        inside = hessian[part, part]
        wanted = values[part] + pull[part] / inside.diagonal()[:, None]
        moves = choose(start, wanted, inside / inside.diagonal(), values[part])
        values[part] = wanted  # stored values by now
        pull[stop:].addmm_(hessian[stop:, part], moves, alpha=-1)


def nearest(w: Weight) -> Callable[[int, Tensor], Tensor]:
    """Return the function from `(column, wanted [out])` to the nearest values that `w` can store in that column."""
    match w:
        case Zero():
            return Zeros().project
        case Dense(values):
            return KeptValues(values.dtype).project
        case Grid(levels=levels) if levels == IQ4_LEVELS:
            return _nearest_iq4(w)
        case Grid():
            return GridPoints.like(w).project
        case Minifloat():
            return FloatPoints.like(w).project
        case Sum() if planes_of(w):
            return Planes.like(planes_of(w)).project
        case Codebook() | Sum() if books_of(w):
            stored = dense(w).T.contiguous()
            return lambda column, wanted: stored[column]  # vectors move before, as a whole
        case Where(index, inside, outside):
            here, there = nearest(inside), nearest(outside)
            chosen = index.inside.expand(shape(w)).T.contiguous()
            return lambda column, wanted: torch.where(chosen[column], here(column, wanted), there(column, wanted))
        case ScaledInputs(inner, columns):
            bare, factors = nearest(inner), columns.float()
            divisors = torch.where(factors == 0, 1.0, factors)
            return lambda column, wanted: bare(column, wanted / divisors[column]) * factors[column]
        case Transpose(Grid(codes, scale, zero, levels, group_size)):
            steps = repeat_groups(scale, group_size, codes.shape[1])  # [in, out]
            middles = [None] * len(steps) if zero is None else repeat_groups(zero, group_size, codes.shape[1])
            return lambda column, wanted: round_to(wanted, steps[column], middles[column], levels)
    raise RecipeError(f"refine cannot move the values of {describe(w)}; leave it out for this layer")


def _nearest_iq4(w: Grid) -> Callable[[int, Tensor], Tensor]:
    """Return `nearest` of a grid that has only the integers of llama.cpp's IQ4 types, turned where its zero point says
    so."""
    table = torch.tensor(IQ4, dtype=torch.float32, device=w.codes.device)
    middles = (table[1:] + table[:-1]) / 2
    turned = torch.zeros_like(w.scale, dtype=torch.bool) if w.zero is None else w.zero != -IQ4[0]
    scale = torch.where(turned, -w.scale.float(), w.scale.float())

    def project(column: int, wanted: Tensor) -> Tensor:
        steps = scale[:, column // w.group_size]
        return table[torch.bucketize(wanted * torch.where(steps == 0, 0.0, 1 / steps), middles)] * steps

    return project


def with_values(w: Weight, values: Tensor) -> Weight:
    """Return `w` with `values [out, in]`, which it can hold."""
    match w:
        case Dense(old):
            return Dense(values.to(old.dtype))
        case Grid(_, scale, zero, levels, group_size):
            return grid_of(values, scale, zero, levels, group_size)
        case Minifloat():
            return FloatPoints.like(w).weight(values)
        case Sum() if planes_of(w):
            return Planes.like(planes_of(w)).weight(values)
        case Where():
            return rebuild(w, lambda path, node, shown: with_values(node, values))
        case ScaledInputs(inner, columns):
            return ScaledInputs(with_values(inner, divide_columns(values, columns)), columns)
        case Transpose(inner):
            return Transpose(with_values(inner, values.T.contiguous()))
        case _:
            return w


def _compressed_base(approx: Weight) -> Weight:
    base = base_and_term(approx)[0]
    known = isinstance(base, Grid | Minifloat | TrellisCodes | Where | ScaledInputs | Transpose)
    in_tables = isinstance(base, Superblocks) and base.form != "TQ2_0"
    if not (known or in_tables or planes_of(base) or books_of(base)):
        raise RecipeError(f"there is nothing to polish in {describe(base)}; prune or quantize first")
    return base
