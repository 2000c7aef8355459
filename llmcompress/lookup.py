"""Some rows of a packed matrix, decoded without the others: what an embedding does for every token.

Works on the disk form (`weight.encode`). Possible where rows are stored one after the other and alike: grids, dense
values, low-rank terms, rotations and sums of these; not behind a selection, whose rows have no fixed place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.packing import unpack, unpack_rows
from llmcompress.weight import Dense, Grid, LowRank, Rotated, Sum, Weight, decode_node, describe, shape


def rows(header: dict[str, Any], tensors: Mapping[str, Tensor], chosen: Tensor) -> Weight:
    """The expression for the rows `chosen [n]` of the matrix that `weight.encode` wrote.

    Raises KeyError for a tensor that is not there, TypeError for a node that has no rows of its own.
    """
    return _rows(header, tensors, "", chosen)


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


def _rows(header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, chosen: Tensor) -> Weight:
    """The rows of the node whose tensors have paths that start with `path`."""
    match header["node"]:
        case "dense":
            return Dense(tensors[path + "values"].reshape(header["shape"])[chosen])
        case "grid":
            return _grid_rows(header, tensors, path, chosen)
        case "low_rank":
            left = _rows(header["left"], tensors, path + "left_", chosen)
            return LowRank(left, decode_node(header["right"], tensors, path + "right_"))
        case "rotated":
            inner = _rows(header["inner"], tensors, path + "inner_", chosen)
            return Rotated(inner, unpack(tensors[path + "signs"], 2, shape(inner)[1]).bool(), header["block"])
        case "sum":
            return Sum(tuple(_rows(part, tensors, f"{path}{i}_", chosen) for i, part in enumerate(header["parts"])))
    raise TypeError(f"a node called {header['node']!r} has no rows of its own")


def _grid_rows(header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, chosen: Tensor) -> Grid:
    levels, width = header["levels"], header["shape"][1]
    codes = unpack_rows(tensors[path + "codes"], levels, width, chosen)
    parameters, groups = header["scale"]
    scale = tensors[path + "scale"].reshape(parameters, groups)
    mine = chosen if parameters > 1 else chosen.new_zeros(1)  # one row of scales may serve all
    zero = unpack_rows(tensors[path + "zero"], levels, groups, mine) if header["asymmetric"] else None
    return Grid(codes, scale[mine], zero, levels, header["group_size"])
