"""Operations on whole weights: sums, rows below each other, and the first components of low-rank terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import (
    Columns,
    Dense,
    Grid,
    LowRank,
    Sum,
    Tiles,
    Transpose,
    Weight,
    Where,
    Zero,
    children,
    rebuild,
    shape,
    stored_tensors,
    unknown,
    with_fields,
)


def add_to_base(base: Weight, own: Weight) -> Weight:
    """Return a weight that several layers share, plus what one of them adds to it."""
    match own:
        case Zero():
            return base
        case Sum(parts):
            return Sum((base, *parts))
    return Sum((base, own))


def add_term(w: Weight, term: LowRank) -> Weight:
    """Return a weight plus one more low-rank term, which comes last."""
    match w:
        case Zero():
            return term
        case Sum(parts):
            return Sum((*parts, term))
    return Sum((w, term))


def join_rows(parts: Sequence[Weight]) -> Weight:
    """Return matrices of the same form, one below the other.

    Raises TypeError for a form whose rows do not lie below each other, ValueError for parts that differ in what all
    rows share.
    """
    first = parts[0]
    match first:
        case Zero((_, width)):
            return Zero((sum(shape(part)[0] for part in parts), width))
        case LowRank() | Transpose() | Tiles():
            raise unknown("join_rows", first)
    own: dict[str, Any] = {}
    for same in zip(*map(stored_tensors, parts), strict=True):
        tensors = [part.tensor for part in same]
        shared = same[0].per == "node" or (same[0].per == "row" and len(tensors[0]) < shape(first)[0])
        own[same[0].name] = _common_tensor(tensors, same[0].name) if shared else torch.cat(tensors)
    if isinstance(first, Where):
        insides = [part.index.inside for part in parts if isinstance(part, Where)]
        inside = _common_tensor(insides, "columns") if isinstance(first.index, Columns) else torch.cat(insides)
        own["index"] = replace(first.index, inside=inside)
    levels = zip(*([node for _, node, _ in children(part)] for part in parts), strict=True)
    below = iter([join_rows(level) for level in levels])
    return with_fields(rebuild(first, lambda path, node, shown: next(below)), own)


def _common_tensor(tensors: Sequence[Tensor], name: str) -> Tensor:
    if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        raise ValueError(f"parts with other {name} each cannot be joined; compress the matrix in one piece")
    return tensors[0]


def truncate_low_rank(w: Weight, rank: int) -> Weight:
    """Return a weight whose low-rank terms keep their first `rank` components; `w` itself where none has more.

    Methods of this package sort components by importance, so the first k are close to the best term of rank k; training
    may change that order. Raises RecipeError where nothing would be left, or for factors stored in another form than
    `Dense` or `Grid`.
    """
    if isinstance(w, LowRank):
        if shape(w.left)[1] <= rank:
            return w
        if rank == 0:
            raise RecipeError("rank 0 leaves nothing of a matrix that is two factors; keep 1 component or more")
        return LowRank(_first_columns(w.left, rank), _first_rows(w.right, rank))
    if rank == 0 and isinstance(w, Sum):
        others = tuple(part for part in w.parts if not isinstance(part, LowRank))
        if 0 < len(others) < len(w.parts):
            return truncate_low_rank(others[0] if len(others) == 1 else Sum(others), rank)
    shorter = rebuild(w, lambda path, node, shown: truncate_low_rank(node, rank))
    same = all(new is old for (_, new, _), (_, old, _) in zip(children(shorter), children(w)))
    return w if same else shorter


def _first_columns(w: Weight, count: int) -> Weight:
    match w:
        case Dense(values):
            return Dense(values[:, :count].contiguous())
        case Grid(codes, scale, zero, levels, group_size):
            groups = -(-count // group_size)
            scale, zero = scale[:, :groups].contiguous(), None if zero is None else zero[:, :groups].contiguous()
            return Grid(codes[:, :count].contiguous(), scale, zero, levels, min(group_size, count))
    raise _cannot_truncate(w)


def _first_rows(w: Weight, count: int) -> Weight:
    match w:
        case Dense(values):
            return Dense(values[:count].contiguous())
        case Grid(codes, scale, zero, levels, group_size):
            if len(scale) > 1:  # a single row of scales serves all rows
                scale, zero = scale[:count].contiguous(), None if zero is None else zero[:count].contiguous()
            return Grid(codes[:count].contiguous(), scale, zero, levels, group_size)
    raise _cannot_truncate(w)


def _cannot_truncate(w: Weight) -> RecipeError:
    return RecipeError(f"a factor that is stored as {describe(w)} cannot be cut; shrink terms of 16 bits, or of grids")
