"""The first components of low-rank terms.

The components of a term that a method of this package fits come by what they are worth, so the first k of them are
nearly the best term of rank k: a checkpoint with generous terms holds all the sizes below it, which need no calibration
to be had. After a distillation the order is that of the start.
"""

from __future__ import annotations

from llmcompress.errors import RecipeError
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Dense, Grid, LowRank, Sum, Weight, children, rebuild, shape


def truncate_low_rank(w: Weight, rank: int) -> Weight:
    """Return a weight whose low-rank terms have their first `rank` components; `w` itself where none has more.

    Raises RecipeError where nothing would be left, or for factors that are stored in a form that has no columns.
    """
    if isinstance(w, LowRank):
        return _truncate(w, rank) if shape(w.left)[1] > rank else w
    if rank == 0 and isinstance(w, Sum):
        others = tuple(part for part in w.parts if not isinstance(part, LowRank))
        if 0 < len(others) < len(w.parts):
            return truncate_low_rank(others[0] if len(others) == 1 else Sum(others), rank)
    found = rebuild(w, lambda path, node, shown: truncate_low_rank(node, rank))
    same = all(new is old for (_, new, _), (_, old, _) in zip(children(found), children(w)))
    return w if same else found


def _truncate(term: LowRank, rank: int) -> LowRank:
    if rank == 0:
        raise RecipeError("rank 0 leaves nothing of a matrix that is two factors; keep 1 component or more")
    return LowRank(_first_columns(term.left, rank), _first_rows(term.right, rank))


def _first_columns(w: Weight, count: int) -> Weight:
    """Return the first columns of a factor [out, rank]."""
    match w:
        case Dense(values):
            return Dense(values[:, :count].contiguous())
        case Grid(codes, scale, zero, levels, group_size):
            groups = -(-count // group_size)
            scale, zero = scale[:, :groups].contiguous(), None if zero is None else zero[:, :groups].contiguous()
            return Grid(codes[:, :count].contiguous(), scale, zero, levels, min(group_size, count))
    raise _unknown(w)


def _first_rows(w: Weight, count: int) -> Weight:
    """Return the first rows of a factor [rank, in]."""
    match w:
        case Dense(values):
            return Dense(values[:count].contiguous())
        case Grid(codes, scale, zero, levels, group_size):
            if len(scale) > 1:  # else one row of them is that of all rows
                scale, zero = scale[:count].contiguous(), None if zero is None else zero[:count].contiguous()
            return Grid(codes[:count].contiguous(), scale, zero, levels, group_size)
    raise _unknown(w)


def _unknown(w: Weight) -> RecipeError:
    return RecipeError(f"a factor that is stored as {describe(w)} cannot be cut; shrink terms of 16 bits, or of grids")
