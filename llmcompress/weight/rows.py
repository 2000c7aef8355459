"""Rows of a packed matrix, decoded without the others, as an embedding does for every token.

Works on the disk form (`encoding.encode`), where leaves lie row after row. Behind a selection a row has as many
elements as the index selects in it: column sets and n:m patterns select equally many in every row; of a bitmap the bits
before the row are counted. A selection within another is not supported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import RecipeError
from llmcompress.weight.encoding import Reader, pattern_tables, trellis_of
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Bitmap, Dense, LowRank, Tiles, Transpose, Weight, Where, children
from llmcompress.weight.packing import ones_before, unpack, unpack_at, unpack_rows
from llmcompress.weight.trellis import cuts, table


def rows(header: dict[str, Any], tensors: Mapping[str, Tensor], chosen: Tensor) -> Weight:
    """Return the expression for the rows `chosen [n]` of an encoded matrix.

    Raises KeyError for a missing tensor, TypeError for a node without rows of its own.
    """
    return _RowReader(tensors, chosen=chosen).node(header)


def check_rows(w: Weight, shown: Tensor | None = None) -> None:
    """Raise RecipeError for an expression whose rows cannot be decoded one by one; `shown` as in `children`."""
    match w:
        case Transpose() | Tiles():
            raise RecipeError(
                f"rows of {describe(w)} cannot be looked up one by one; give embeddings groups along the input"
            )
        case Where() if shown is not None:
            raise RecipeError(
                f"rows of {describe(w)} within a selection cannot be looked up one by one; give embeddings one "
                f"selection (pruning or salient weights) at most"
            )
        case LowRank(left):
            check_rows(left)
        case _:
            for _, node, here in children(w, shown):
                check_rows(node, here)


def has_rows(header: dict[str, Any], is_selected: bool = False) -> bool:
    """True if `rows` can read a matrix with this header; `is_selected`: the matrix lies behind a selection."""
    match header["node"]:
        case "transposed" | "tiles":
            return False
        case "where":
            return not is_selected and has_rows(header["inside"], True) and has_rows(header["outside"], True)
        case "low_rank":
            return has_rows(header["left"])
        case "rotated":
            return has_rows(header["inner"])
        case "scaled":
            return has_rows(header["inner"], is_selected)
        case "sum":
            return all(has_rows(part, is_selected) for part in header["parts"])
    return True


@dataclass(frozen=True, eq=False)
class _RowReader(Reader):
    """Decodes the rows `chosen [n]` of nodes; of a leaf behind a selection, `shown [n, in]` is stored."""

    chosen: Tensor = field(kw_only=True)
    first: Tensor | None = None  # int64 [n]: the number of each row's first stored element, behind a selection

    def node(self, header: dict[str, Any]) -> Weight:
        match header["node"]:
            case "trellis" | "linear_trellis":
                numbers = _trellis_rows(header, self.own("codes"), self.chosen)
                return Dense(numbers * self.rows("scale", (header["shape"][0], 1)).float())
            case "low_rank":
                right = Reader(self.tensors, self.path + "right_").node(header["right"])
                return LowRank(self.below("left_", header["left"]), right)
            case "where" if self.shown is None:
                width = header["shape"][1]
                selected, before = _select_rows(header["index"], width, self.own("index"), self.chosen)
                inside = replace(self, first=before).below("inside_", header["inside"], selected)
                rest = replace(self, first=self.chosen * width - before)
                return Where(Bitmap(selected), inside, rest.below("outside_", header["outside"], ~selected))
            case "where" | "transposed" | "tiles":
                raise TypeError(f"a node called {header['node']!r} has no rows of its own")
        return super().node(header)

    def size(self, header: dict[str, Any]) -> tuple[int, int]:
        return self.chosen.shape[0], header["shape"][1]

    def elements(self, name: str, header: dict[str, Any], levels: int | None = None) -> Tensor:
        stored, size = self.own(name), self.size(header)
        if self.shown is None or self.first is None:
            if levels is None:
                return stored.reshape(header["shape"])[self.chosen]
            return unpack_rows(stored, levels, size[1], self.chosen)
        if not len(stored):  # nothing of the matrix is shown
            return stored.new_zeros(size)
        places = (self.first[:, None] + self.shown.cumsum(1) - 1).clamp_min(0).flatten()  # also of what is hidden
        numbers = stored[places] if levels is None else unpack_at(stored, levels, places)
        return numbers.view(self.shown.shape).where(self.shown, 0)

    def rows(self, name: str, size: Sequence[int], levels: int | None = None) -> Tensor:
        stored, chosen = self.own(name), self.chosen.clamp_max(size[0] - 1)  # one row may serve all
        return stored.reshape(*size)[chosen] if levels is None else unpack_rows(stored, levels, size[1], chosen)


def _select_rows(index: dict[str, Any], width: int, packed: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the selection in rows, bool `[n, in]`, and the number of selected elements before each, int64 `[n]`."""
    match index["kind"]:
        case "columns":
            inside = unpack(packed, 2, width).bool()
            return inside.expand(chosen.shape[0], width), chosen * inside.sum()
        case "bitmap":
            return unpack_rows(packed, 2, width, chosen).bool(), ones_before(packed, chosen * width)
        case "pattern":
            kept, group = index["kept"], index["group"]
            numbers = unpack_rows(packed, math.comb(group, kept), width // group, chosen)
            patterns = pattern_tables(kept, group)[1].to(packed.device)
            return patterns[numbers.long()].reshape(chosen.shape[0], width), chosen * (width // group * kept)
    raise TypeError(f"no index is called {index['kind']!r}")


def _trellis_rows(header: dict[str, Any], stored: Tensor, chosen: Tensor) -> Tensor:
    """Return numbers of a trellis `[n, in]`, float32, from the codes in the state at each place."""
    trellis = trellis_of(header)
    rows, width = header["shape"]
    edges = torch.tensor(cuts(rows, header["run"], trellis), device=chosen.device)
    step = chosen // trellis.values
    run = torch.bucketize(step, edges, right=True) - 1
    first, length = edges[run], edges[run + 1] - edges[run]
    stream = first * width  # where it begins, in codes
    column = stream[:, None] + length[:, None] * torch.arange(width, device=chosen.device)
    place = (step - first)[:, None]
    state = torch.zeros_like(column)
    for back in range(-(-trellis.memory // trellis.bits)):
        wanted = column + ((place - back) % length[:, None] if trellis.ring else place - back)
        codes = unpack_at(stored, 1 << trellis.bits, wanted.clamp_min(0).flatten())
        held = codes.reshape(column.shape).long() << (back * trellis.bits)
        state |= torch.where(wanted >= stream[:, None], held, 0)  # before a stream begins, all is 0
    numbers = table(trellis).to(chosen.device)[state & ((1 << trellis.memory) - 1)]  # [n, in, values]
    return numbers.gather(2, (chosen % trellis.values)[:, None, None].expand(-1, width, 1))[..., 0]


def row_scale(table: nn.Module) -> float | None:
    """Return the factor of an embedding's rows; None if it only looks them up.

    Raises TypeError for an embedding that does something else.
    """
    if type(table) is nn.Embedding:
        return None
    scale = getattr(table, "scalar_embed_scale", None)  # of Gemma and its kin
    if not isinstance(table, nn.Embedding) or not isinstance(scale, float):
        raise TypeError(f"a {type(table).__name__} does more than look up rows and scale them")
    return scale


def is_plain_table(table: nn.Module) -> bool:
    """True if an embedding only looks up rows and scales them, so that a compressed one can take its place."""
    try:
        row_scale(table)
    except TypeError:
        return False
    return True
