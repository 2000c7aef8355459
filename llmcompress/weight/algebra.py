"""Operations on whole weights: sums, rows below each other, and components of low-rank terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.weight.expression import describe, device
from llmcompress.weight.nodes import (
    Columns,
    Dense,
    Grid,
    LowRank,
    ScaledInputs,
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
    """Return a weight with the first `rank` components of its low-rank terms; `w` itself where there are no more.

    Components of several terms count together, from the innermost sum out, in the order of the terms. Methods of this
    package sort those of a term by importance, so the first k are close to the best term of rank k; training may change
    that order, unless it is `nested`. Raises RecipeError where nothing would be left, or for factors stored in another
    form than `Dense` or `Grid`.
    """

    def keep_first(term: LowRank, before: int) -> Sequence[LowRank]:
        return [_slice_term(term, 0, rank - before)] if rank > before else []

    return _change_terms(w, keep_first)


def mute_components(w: Weight, rank: int) -> Weight:
    """Return the matrix of `truncate_low_rank` as an expression of all tensors of `w`, so that each has a gradient."""

    def mute(term: LowRank, before: int) -> Sequence[LowRank]:
        size = shape(term.left)[1]
        if before + size <= rank:
            return [term]
        stays = torch.arange(before, before + size, device=device(term.left)) < rank
        return [LowRank(ScaledInputs(term.left, stays.float()), term.right)]

    return _change_terms(w, mute)


def split_components(w: Weight, ranks: Sequence[int]) -> Weight:
    """Return a weight whose low-rank terms are taken apart, so that each of `ranks` components is a number of terms.

    Raises RecipeError as `truncate_low_rank` does.
    """

    def split_term(term: LowRank, before: int) -> Sequence[LowRank]:
        size = shape(term.left)[1]
        ends = [0, *sorted(rank - before for rank in ranks if 0 < rank - before < size), size]
        return [_slice_term(term, start, stop) for start, stop in pairwise(ends)]

    return _change_terms(w, split_term)


def term_ends(w: Weight, path: str = "", before: int = 0) -> Iterator[tuple[str, int]]:
    """Yield the path of each low-rank term, and the components up to its end in all sums around it.

    `before`: the components in front of `w`.
    """
    if isinstance(w, LowRank):
        yield path, before + shape(w.left)[1]
        return
    for place, node, _ in list(children(w))[2 * _has_offsets(w) :]:
        ends = list(term_ends(node, path + place, before))
        yield from ends
        if isinstance(w, Sum):
            before = max((end for _, end in ends), default=before)


def _has_offsets(w: Weight) -> bool:
    """True if a sum begins with a grid's offsets by group, as types of GGUF have them: two factors, but no term."""
    return isinstance(w, Sum) and len(w.parts) > 1 and isinstance(w.parts[0], LowRank) and isinstance(w.parts[1], Grid)


def _change_terms(w: Weight, change: Callable[[LowRank, int], Sequence[LowRank]], before: int = 0) -> Weight:
    """Return a weight with other low-rank terms; `w` itself if they are the same.

    `change(term, before)` returns what takes a term's place; `before`: the components in front of it, or of `w`.
    """
    if not isinstance(w, LowRank | Sum):
        changed = rebuild(w, lambda path, node, shown: _change_terms(node, change, before))
        same = all(new is old for (_, new, _), (_, old, _) in zip(children(changed), children(w)))
        return w if same else changed
    parts = w.parts if isinstance(w, Sum) else (w,)
    offsets = _has_offsets(w)
    after: list[Weight] = list(parts[: 2 * offsets])
    for part in parts[2 * offsets :]:
        after += change(part, before) if isinstance(part, LowRank) else [_change_terms(part, change, before)]
        before = max((end for _, end in term_ends(part, "", before)), default=before)
    if not after:
        raise RecipeError("rank 0 leaves nothing of a matrix that is two factors; keep 1 component or more")
    if len(after) == len(parts) and all(new is old for new, old in zip(after, parts, strict=True)):
        return w
    return after[0] if len(after) == 1 else Sum(tuple(after))


def _slice_term(term: LowRank, start: int, stop: int) -> LowRank:
    """Return the components of a term from `start` on, up to `stop`; the term itself if these are all."""
    if start == 0 and stop >= shape(term.left)[1]:
        return term
    return LowRank(_columns(term.left, start, stop), _rows(term.right, start, stop))


def _columns(w: Weight, start: int, stop: int) -> Weight:
    match w:
        case Dense(values):
            return Dense(values[:, start:stop].contiguous())
        case Grid(codes, scale, zero, levels, group_size) if start % group_size == 0 or scale.shape[1] == 1:
            if scale.shape[1] > 1:
                groups = slice(start // group_size, -(-stop // group_size))
                scale, zero = scale[:, groups].contiguous(), None if zero is None else zero[:, groups].contiguous()
            codes = codes[:, start:stop].contiguous()
            return Grid(codes, scale, zero, levels, min(group_size, codes.shape[1]))
    raise _cannot_truncate(w)


def _rows(w: Weight, start: int, stop: int) -> Weight:
    match w:
        case Dense(values):
            return Dense(values[start:stop].contiguous())
        case Grid(codes, scale, zero, levels, group_size):
            if len(scale) > 1:  # a single row of scales serves all rows
                scale = scale[start:stop].contiguous()
                zero = None if zero is None else zero[start:stop].contiguous()
            return Grid(codes[start:stop].contiguous(), scale, zero, levels, group_size)
    raise _cannot_truncate(w)


def _cannot_truncate(w: Weight) -> RecipeError:
    return RecipeError(f"a factor that is stored as {describe(w)} cannot be cut; shrink terms of 16 bits, or of grids")
