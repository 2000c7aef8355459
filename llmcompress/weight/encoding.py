"""The disk form of a compressed weight: a JSON header and flat tensors, written by `encode`, read back by `Reader`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcompress.weight.constants import constant
from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Columns,
    Dense,
    Grid,
    Index,
    LowRank,
    Minifloat,
    Pattern,
    RotatedInputs,
    ScaledInputs,
    StoredTensor,
    Sum,
    Superblocks,
    Tiles,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    both,
    children,
    float_codes,
    shape,
    shown_count,
    stored_tensors,
    unknown,
)
from llmcompress.weight.packing import codes_in_bytes, pack, unpack
from llmcompress.weight.superblocks import LAYOUTS, SUPERBLOCK
from llmcompress.weight.tiles import SIDE, STEPS
from llmcompress.weight.trellis import Code, Trellis

CODES: dict[Code, str] = {"table": "trellis", "linear": "linear_trellis"}
SIZES = ("bits", "values", "memory")


def encode(w: Weight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a JSON header and flat tensors, each under its path in the expression; `decode` inverts it bit for bit."""
    tensors: dict[str, Tensor] = {}
    return _encode(w, None, "", tensors), tensors


def decode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Weight:
    """Return the weight that `encode` wrote. Raises KeyError for a missing tensor.

    Codes may also be unpacked, whole numbers in a float dtype, as when they train.
    """
    return Reader(tensors).node(header)


def _encode(w: Weight, shown: Tensor | None, path: str, out: dict[str, Tensor]) -> dict[str, Any]:
    header = _header(w)
    if isinstance(w, Where):
        header["index"] = _encode_index(w.index, path, out)
    own = {path + part.name: _flat(part, shown) for part in stored_tensors(w)}
    if not isinstance(w, RotatedInputs):  # format 3 has the signs of a rotation behind what is rotated
        out.update(own)
    below = {place: _encode(node, here, path + place, out) for place, node, here in children(w, shown)}
    out.update(own)
    if isinstance(w, Sum):
        return header | {"parts": list(below.values())}
    return header | {place.removesuffix("_"): part for place, part in below.items()}


def _flat(part: StoredTensor, shown: Tensor | None) -> Tensor:
    numbers = part.numbers(shown)
    return numbers.contiguous() if part.levels is None else pack(numbers.to(torch.uint8), part.levels)


def _header(w: Weight) -> dict[str, Any]:
    """Return the header of a node without its index and its children."""
    size = {"shape": list(shape(w))}
    match w:
        case Zero():
            return {"node": "zero", **size}
        case Dense():
            return {"node": "dense", **size}
        case Grid(_, scale, zero, levels, group_size):
            affine = {"scale": list(scale.shape), "asymmetric": zero is not None}
            return {"node": "grid", **size, "levels": levels, "group_size": group_size, **affine}
        case TrellisCodes(trellis=trellis, run=run):
            name = CODES[trellis.code]  # of its own, so that readers of format 3 that lack a code refuse it
            ring = {"ring": True} if trellis.ring else {}  # which readers of format 3 that lack rings refuse
            return {"node": name, **size, "run": run, **{key: getattr(trellis, key) for key in SIZES}, **ring}
        case Tiles(bits=bits):
            return {"node": "tiles", **size, "bits": bits}
        case Superblocks(form=form):
            return {"node": "superblocks", **size, "form": form}
        case Codebook(centroids=centroids):
            return {"node": "codebook", **size, "entries": len(centroids), "length": centroids.shape[1]}
        case Minifloat(_, scale, tensor_scale, form, scales, group_size):
            kind = {"form": form, "scales": scales, "group_size": group_size, "tensor_scale": tensor_scale is not None}
            of_all = {"scale": list(scale.shape)} if len(scale) < shape(w)[0] else {}
            return {"node": "minifloat", **size, **kind, **of_all}
        case LowRank():
            return {"node": "low_rank"}
        case Where():
            return {"node": "where", **size}
        case RotatedInputs(block=block):
            return {"node": "rotated", "block": block}
        case ScaledInputs():
            return {"node": "scaled"}
        case Transpose():
            return {"node": "transposed", **size}
        case Sum():
            return {"node": "sum"}
    raise unknown("encode", w)


def trellis_of(header: dict[str, Any]) -> Trellis:
    """Return the trellis of a header."""
    code: Code = "table" if header["node"] == CODES["table"] else "linear"
    return Trellis(header["bits"], header["values"], header["memory"], code, header.get("ring", False))


@dataclass(frozen=True, eq=False)
class Reader:
    """Decodes nodes from headers and stored tensors.

    The names of a node's tensors begin with `path`; `shown`: the part of it that is stored (None: all).
    """

    tensors: Mapping[str, Tensor]
    path: str = ""
    shown: Tensor | None = None

    def node(self, header: dict[str, Any]) -> Weight:
        """Return the node of a header. Raises TypeError for an unknown node."""
        match header["node"]:
            case "zero":
                return Zero(self.size(header))
            case "dense":
                return Dense(self.elements("values", header))
            case "grid":
                levels, parameters = header["levels"], header["scale"]
                zero = self.rows("zero", parameters, levels) if header["asymmetric"] else None
                codes = self.elements("codes", header, levels)
                return Grid(codes, self.rows("scale", parameters), zero, levels, header["group_size"])
            case "trellis" | "linear_trellis":
                trellis = trellis_of(header)
                rows, width = header["shape"]
                codes = unpack(self.own("codes"), 1 << trellis.bits, rows * width // trellis.values)
                return TrellisCodes(codes, self.rows("scale", (rows, 1)), trellis, header["run"])
            case "tiles":
                rows, width = header["shape"]
                codes = unpack(self.own("codes"), 1 << header["bits"], rows * width)
                tiled = codes.reshape(width // SIDE, rows // SIDE, STEPS)
                return Tiles(tiled, self.own("inputs"), self.own("outputs"), header["bits"])
            case "superblocks":
                (rows, width), form = header["shape"], header["form"]
                return Superblocks(self.rows("codes", (rows, width // SUPERBLOCK * LAYOUTS[form].bytes)), form)
            case "codebook":
                (rows, width), length = header["shape"], header["length"]
                codes = self.rows("codes", (rows, -(-width // length)), header["entries"])
                return Codebook(codes, self.own("centroids").reshape(-1, length), self.rows("scale", (rows, 1)), width)
            case "minifloat":
                (rows, width), form, group_size = header["shape"], header["form"], header["group_size"]
                codes = self.elements("codes", header, float_codes(form))
                scale = self.rows("scale", header.get("scale", (rows, -(-width // group_size))))
                factor = self.own("tensor_scale") if header["tensor_scale"] else None
                return Minifloat(codes, scale, factor, form, header["scales"], group_size)
            case "low_rank":
                return LowRank(self.below("left_", header["left"]), self.below("right_", header["right"]))
            case "where":
                index = decode_index(header["index"], header["shape"], self.own("index"))
                inside = self.below("inside_", header["inside"], both(self.shown, index.inside))
                return Where(index, inside, self.below("outside_", header["outside"], both(self.shown, ~index.inside)))
            case "rotated":
                inner = self.below("inner_", header["inner"])
                return RotatedInputs(inner, unpack(self.own("signs"), 2, shape(inner)[1]).bool(), header["block"])
            case "scaled":
                return ScaledInputs(self.below("inner_", header["inner"], self.shown), self.own("columns"))
            case "transposed":
                lying = None if self.shown is None else self.shown.expand(header["shape"]).T
                return Transpose(self.below("inner_", header["inner"], lying))
            case "sum":
                parts = enumerate(header["parts"])
                return Sum(tuple(self.below(f"{i}_", part, self.shown) for i, part in parts))
        raise TypeError(f"no weight node is called {header['node']!r}")

    def below(self, path: str, header: dict[str, Any], shown: Tensor | None = None) -> Weight:
        """Return a child, whose path continues with `path`."""
        return replace(self, path=self.path + path, shown=shown).node(header)

    def own(self, name: str) -> Tensor:
        """Return a tensor of the node itself as it is stored, flat."""
        return self.tensors[self.path + name]

    def size(self, header: dict[str, Any]) -> tuple[int, int]:
        """Return the size of the node that is read."""
        return header["shape"][0], header["shape"][1]

    def elements(self, name: str, header: dict[str, Any], levels: int | None = None) -> Tensor:
        """Return a tensor `[out, in]` of which only shown elements are stored; the others are zero."""
        numbers, (rows, width) = self.own(name), self.size(header)
        if levels is not None and not numbers.is_floating_point():
            numbers = unpack(numbers, levels, self._count(numbers, levels, (rows, width)))
        return expand(numbers, (rows, width), self.shown)

    def _count(self, packed: Tensor, levels: int, size: tuple[int, int]) -> int:
        """Return the number of stored codes; in a program that is traced, which knows no values, the most possible."""
        if self.shown is None:
            return math.prod(size)
        if torch.compiler.is_compiling():
            return codes_in_bytes(levels, len(packed))[1]
        return shown_count(self.shown, size)

    def rows(self, name: str, size: Sequence[int], levels: int | None = None) -> Tensor:
        """Return a tensor of that size, with a row for each row of the matrix, or one for all."""
        numbers = self.own(name)
        return (numbers if levels is None else unpack(numbers, levels, math.prod(size))).reshape(*size)


def _encode_index(index: Index, path: str, out: dict[str, Tensor]) -> dict[str, Any]:
    match index:
        case Columns(inside) | Bitmap(inside):
            out[path + "index"] = pack(inside.to(torch.uint8), 2)
            return {"kind": type(index).__name__.lower()}
        case Pattern(inside, kept, group):
            ranks = pattern_tables(kept, group)[0].to(inside.device)
            powers = 2 ** torch.arange(group, device=inside.device)
            numbers = (inside.reshape(-1, group).long() * powers).sum(1)
            out[path + "index"] = pack(ranks[numbers], math.comb(group, kept))
            return {"kind": "pattern", "kept": kept, "group": group}
    raise unknown("encode", index)


def decode_index(header: dict[str, Any], size: list[int], packed: Tensor) -> Index:
    """Return the index of a matrix of that size from its header and its packed tensor."""
    match header["kind"]:
        case "columns":
            return Columns(unpack(packed, 2, size[1]).bool())
        case "bitmap":
            return Bitmap(unpack(packed, 2, math.prod(size)).bool().reshape(size))
        case "pattern":
            kept, group = header["kept"], header["group"]
            numbers = unpack(packed, math.comb(group, kept), math.prod(size) // group)
            patterns = pattern_tables(kept, group)[1].to(packed.device)
            return Pattern(patterns[numbers.long()].reshape(size), kept, group)
    raise TypeError(f"no index is called {header['kind']!r}")


@constant
def pattern_tables(kept: int, group: int) -> tuple[Tensor, Tensor]:
    """Return (rank of every `group`-bit number with `kept` ones, uint8 [2^group]; patterns by rank, bool [C, group])"""
    if math.comb(group, kept) > 256:
        raise ValueError(f"{kept}:{group} has {math.comb(group, kept)} patterns; at most 256 fit in a byte")
    chosen = list(itertools.combinations(range(group), kept))
    patterns = torch.zeros(len(chosen), group, dtype=torch.bool)
    ranks = torch.zeros(2**group, dtype=torch.uint8)
    for rank, columns in enumerate(chosen):
        patterns[rank, list(columns)] = True
        ranks[sum(1 << column for column in columns)] = rank
    return ranks, patterns


def expand(numbers: Tensor, size: tuple[int, int], shown: Tensor | None) -> Tensor:
    """Return stored elements at their places; zeros where nothing is shown."""
    if shown is None:
        return numbers.reshape(size)
    shown = shown.expand(size)
    if torch.compiler.is_compiling():  # which knows no values, so neither how many are shown
        places = (shown.flatten().cumsum(0) - 1).clamp_min(0).view(size)
        return numbers[places].where(shown, 0) if len(numbers) else numbers.new_zeros(size)
    full = torch.zeros(size, dtype=numbers.dtype, device=numbers.device)
    full[shown] = numbers
    return full
