"""Some rows of a packed matrix, decoded without the others: what an embedding does for every token.

Works on the disk form (`encoding.encode`), where leaves lie row after row. Behind a selection a row has as many
elements as the index selects in it: column sets and n:m patterns select equally many everywhere, the bits of a bitmap
before the row are counted. A selection within another has no such short way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.weight.encoding import decode_node, expand, pattern_tables
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Dense,
    Grid,
    LowRank,
    Rotated,
    Scaled,
    Sum,
    Transposed,
    TrellisCoded,
    Weight,
    Where,
    Zero,
    shape,
)
from llmcompress.weight.packing import ones_before, unpack, unpack_at, unpack_rows
from llmcompress.weight.trellis import Trellis, cuts, table


def rows(header: dict[str, Any], tensors: Mapping[str, Tensor], chosen: Tensor) -> Weight:
    """The expression for the rows `chosen [n]` of the matrix that `encoding.encode` wrote.

    Raises KeyError for a tensor that is not there, TypeError for a node that has no rows of its own.
    """
    return _rows(header, tensors, "", chosen, None)


def check_rows(w: Weight, selected: bool = False) -> None:
    """Raises RecipeError for an expression whose rows cannot be decoded one by one."""
    match w:
        case Zero() | Dense() | Grid() | TrellisCoded() | Codebook():
            return
        case LowRank(left) | Rotated(left):
            check_rows(left)
        case Scaled(inner):
            check_rows(inner, selected)
        case Transposed():
            raise RecipeError(
                f"rows of {describe(w)} cannot be looked up one by one; give embeddings groups along the input"
            )
        case Sum(parts):
            for part in parts:
                check_rows(part, selected)
        case Where(_, inside, outside) if not selected:
            check_rows(inside, selected=True)
            check_rows(outside, selected=True)
        case _:
            raise RecipeError(
                f"rows of {describe(w)} within a selection cannot be looked up one by one; give embeddings one "
                f"selection (pruning or salient weights) at most"
            )


@dataclass(frozen=True, eq=False)
class _Selection:
    """Of a leaf that stores some elements of a row only."""

    shown: Tensor  # bool [n, in], true = stored
    first: Tensor  # int64 [n]: the number of the row's first stored element

    def places(self) -> Tensor:
        """The numbers of the stored elements, flat."""
        found = self.first[:, None] + self.shown.cumsum(1) - 1
        return found[self.shown]

    def spread(self, stored: Tensor) -> Tensor:
        """Stored elements at their places, `[n, in]`; zeros where nothing is shown."""
        return expand(stored, list(self.shown.shape), self.shown)


def _rows(
    header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, chosen: Tensor, selection: _Selection | None
) -> Weight:
    """The rows of the node whose tensors have paths that start with `path`."""
    match header["node"]:
        case "zero":
            return Zero((len(chosen), header["shape"][1]))
        case "dense":
            values = tensors[path + "values"]
            if selection is not None:
                return Dense(selection.spread(values[selection.places()]))
            return Dense(values.reshape(header["shape"])[chosen])
        case "grid":
            return _grid_rows(header, tensors, path, chosen, selection)
        case "trellis" if selection is None:
            return Dense(_trellis_rows(header, tensors, path, chosen))
        case "codebook":
            return _codebook_rows(header, tensors, path, chosen)
        case "low_rank":
            left = _rows(header["left"], tensors, path + "left_", chosen, None)
            return LowRank(left, decode_node(header["right"], tensors, path + "right_"))
        case "rotated":
            inner = _rows(header["inner"], tensors, path + "inner_", chosen, None)
            return Rotated(inner, unpack(tensors[path + "signs"], 2, shape(inner)[1]).bool(), header["block"])
        case "scaled":
            return Scaled(
                _rows(header["inner"], tensors, path + "inner_", chosen, selection), tensors[path + "columns"]
            )
        case "sum":
            parts = enumerate(header["parts"])
            return Sum(tuple(_rows(part, tensors, f"{path}{i}_", chosen, selection) for i, part in parts))
        case "where" if selection is None:
            width = header["shape"][1]
            here, first = _selected(header["index"], width, tensors[path + "index"], chosen)
            rest = _Selection(~here, chosen * width - first)
            inside = _rows(header["inside"], tensors, path + "inside_", chosen, _Selection(here, first))
            return Where(Bitmap(here), inside, _rows(header["outside"], tensors, path + "outside_", chosen, rest))
    raise TypeError(f"a node called {header['node']!r} has no rows of its own")


def _selected(index: dict[str, Any], width: int, packed: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What an index selects in rows, bool `[n, in]`, and how many elements it selects before each, int64 `[n]`."""
    match index["kind"]:
        case "columns":
            inside = unpack(packed, 2, width).bool()
            return inside.expand(len(chosen), width), chosen * inside.sum()
        case "bitmap":
            return unpack_rows(packed, 2, width, chosen).bool(), ones_before(packed, chosen * width)
        case "pattern":
            kept, group = index["kept"], index["group"]
            numbers = unpack_rows(packed, math.comb(group, kept), width // group, chosen)
            patterns = pattern_tables(kept, group)[1].to(packed.device)
            return patterns[numbers.long()].reshape(len(chosen), width), chosen * (width // group * kept)
    raise TypeError(f"no index is called {index['kind']!r}")


def _grid_rows(
    header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, chosen: Tensor, selection: _Selection | None
) -> Grid:
    levels, packed = header["levels"], tensors[path + "codes"]
    if selection is None:
        codes = unpack_rows(packed, levels, header["shape"][1], chosen)
    else:
        codes = selection.spread(unpack_at(packed, levels, selection.places()))
    parameters, groups = header["scale"]
    scale = tensors[path + "scale"].reshape(parameters, groups)
    mine = chosen if parameters > 1 else chosen.new_zeros(1)  # one row of scales may serve all
    zero = unpack_rows(tensors[path + "zero"], levels, groups, mine) if header["asymmetric"] else None
    return Grid(codes, scale[mine], zero, levels, header["group_size"])


def _codebook_rows(header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, chosen: Tensor) -> Codebook:
    width, length = header["shape"][1], header["length"]
    codes = unpack_rows(tensors[path + "codes"], header["entries"], -(-width // length), chosen)
    centroids = tensors[path + "centroids"].reshape(-1, length)
    return Codebook(codes, centroids, tensors[path + "scale"][chosen, None], width)


def _trellis_rows(header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, chosen: Tensor) -> Tensor:
    """Rows `[n, in]`, float32: of every column the codes that fill the state there, no others."""
    trellis = Trellis(header["bits"], header["values"], header["memory"])
    rows, width = header["shape"]
    edges = torch.tensor(cuts(rows, header["run"], trellis), device=chosen.device)
    step = chosen // trellis.values
    mine = torch.bucketize(step, edges, right=True) - 1
    first, length = edges[mine], edges[mine + 1] - edges[mine]
    stream = first * width  # where it begins, in codes
    place = (stream + step - first)[:, None] + length[:, None] * torch.arange(width, device=chosen.device)
    state = torch.zeros_like(place)
    for back in range(-(-trellis.memory // trellis.bits)):
        wanted = place - back
        codes = unpack_at(tensors[path + "codes"], 1 << trellis.bits, wanted.clamp_min(0).flatten())
        held = codes.reshape(place.shape).long() << (back * trellis.bits)
        state |= torch.where(wanted >= stream[:, None], held, 0)  # before a stream begins, all is 0
    numbers = table(trellis).to(chosen.device)[state & ((1 << trellis.memory) - 1)]  # [n, in, values]
    found = numbers.gather(2, (chosen % trellis.values)[:, None, None].expand(-1, width, 1))[..., 0]
    return found * tensors[path + "scale"].float()[chosen, None]
