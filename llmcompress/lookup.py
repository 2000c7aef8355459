"""Some rows of a packed matrix, decoded without the others: what an embedding does for every token.

Works on the disk form (`weight.encode`). Possible where rows are stored one after the other and alike: grids, dense
values, low-rank terms, rotations and sums of these; not behind a selection, whose rows have no fixed place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.packing import unpack, unpack_rows
from llmcompress.weight import Dense, Grid, LowRank, Rotated, Sum, Weight, decode_node, describe, shape


def rows(header: dict[str, Any], tensors: dict[str, Tensor], chosen: Tensor) -> Weight:
    """The expression for the rows `chosen [n]` of the matrix that `weight.encode` wrote.

    Raises KeyError for a tensor that is not there, TypeError for a node that has no rows of its own.
    """
    asked: list[str] = []

    def take(path: str) -> Tensor:
        asked.append(path)
        return tensors["weight" if len(asked) == 1 else f"weight_{path}"]

    return _rows(header, take, "", chosen)


def check_rows(w: Weight) -> None:
    """Raises RecipeError for an expression whose rows cannot be decoded one by one."""
    match w:
        case Dense() | Grid():
            return
        case LowRank(left) | Rotated(left):
            check_rows(left)
        case Sum(parts):
            for part in parts:
                check_rows(part)
        case _:
            raise RecipeError(
                f"rows of {describe(w)} cannot be looked up one by one; quantize embeddings, do not prune"
            )


def _rows(header: dict[str, Any], take: Callable[[str], Tensor], path: str, chosen: Tensor) -> Weight:
    """Asks for tensors in the order of `weight.decode`."""
    match header["node"]:
        case "dense":
            return Dense(take(path + "values").reshape(header["shape"])[chosen])
        case "grid":
            return _grid_rows(header, take, path, chosen)
        case "low_rank":
            left = _rows(header["left"], take, path + "left_", chosen)
            return LowRank(left, decode_node(header["right"], take, path + "right_"))
        case "rotated":
            inner = _rows(header["inner"], take, path + "inner_", chosen)
            return Rotated(inner, unpack(take(path + "signs"), 2, shape(inner)[1]).bool(), header["block"])
        case "sum":
            return Sum(tuple(_rows(part, take, f"{path}{i}_", chosen) for i, part in enumerate(header["parts"])))
    raise TypeError(f"a node called {header['node']!r} has no rows of its own")


def _grid_rows(header: dict[str, Any], take: Callable[[str], Tensor], path: str, chosen: Tensor) -> Grid:
    levels, width = header["levels"], header["shape"][1]
    codes = unpack_rows(take(path + "codes"), levels, width, chosen)
    parameters, groups = header["scale"]
    scale = take(path + "scale").reshape(parameters, groups)
    mine = chosen if parameters > 1 else chosen.new_zeros(1)  # one row of scales may serve all
    zero = unpack_rows(take(path + "zero"), levels, groups, mine) if header["asymmetric"] else None
    return Grid(codes, scale[mine], zero, levels, header["group_size"])
