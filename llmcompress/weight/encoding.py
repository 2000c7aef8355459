"""The disk form of a compressed weight: a JSON header and flat tensors, by one recursion over its nodes.

What a side of a `Where` does not show is not stored: the selection (`shown`, true = stored) goes down to the leaves,
but to those of codebooks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Columns,
    Dense,
    Grid,
    Index,
    LowRank,
    Pattern,
    Rotated,
    Scaled,
    Sum,
    Transposed,
    TrellisCoded,
    Weight,
    Where,
    Zero,
    both,
    shape,
    turned,
    unknown,
)
from llmcompress.weight.packing import pack, unpack
from llmcompress.weight.trellis import Trellis


def encode(w: Weight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A JSON header and flat tensors, each under its path in the expression, that `decode` turns back into `w`, bit for
    bit."""
    tensors: dict[str, Tensor] = {}
    return _encode(w, None, "", tensors), tensors


def decode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Weight:
    """The weight that `encode` wrote; raises KeyError for a tensor that is not there."""
    return decode_node(header, tensors, "", None)


def _encode(w: Weight, shown: Tensor | None, path: str, out: dict[str, Tensor]) -> dict[str, Any]:
    size = list(shape(w))
    match w:
        case Zero():
            return {"node": "zero", "shape": size}
        case Dense(values):
            out[path + "values"] = _compact(values, shown)
            return {"node": "dense", "shape": size}
        case Grid(codes, scale, zero, levels, group_size):
            out[path + "codes"] = pack(_compact(codes, shown), levels)
            out[path + "scale"] = scale.reshape(-1).contiguous()
            if zero is not None:
                out[path + "zero"] = pack(zero, levels)
            affine = {"scale": list(scale.shape), "asymmetric": zero is not None}
            return {"node": "grid", "shape": size, "levels": levels, "group_size": group_size, **affine}
        case TrellisCoded(codes, scale, trellis, run) if shown is None:
            out[path + "codes"] = pack(codes, 1 << trellis.bits)
            out[path + "scale"] = scale.reshape(-1).contiguous()
            return {"node": "trellis", "shape": size, "run": run, **asdict(trellis)}
        case Codebook(codes, centroids, scale):
            out[path + "codes"] = pack(codes, len(centroids))
            out[path + "centroids"] = centroids.reshape(-1).contiguous()
            out[path + "scale"] = scale.reshape(-1).contiguous()
            return {"node": "codebook", "shape": size, "entries": len(centroids), "length": centroids.shape[1]}
        case LowRank(left, right):
            parts = [_encode(left, None, path + "left_", out), _encode(right, None, path + "right_", out)]
            return {"node": "low_rank", "left": parts[0], "right": parts[1]}
        case Where(index, inside, outside):
            header: dict[str, Any] = {"node": "where", "shape": size, "index": _encode_index(index, path, out)}
            header["inside"] = _encode(inside, both(shown, index.inside), path + "inside_", out)
            header["outside"] = _encode(outside, both(shown, ~index.inside), path + "outside_", out)
            return header
        case Rotated(inner, signs, block):
            header = {"node": "rotated", "block": block, "inner": _encode(inner, None, path + "inner_", out)}
            out[path + "signs"] = pack(signs.to(torch.uint8), 2)
            return header
        case Scaled(inner, columns):
            out[path + "columns"] = columns.contiguous()
            return {"node": "scaled", "inner": _encode(inner, shown, path + "inner_", out)}
        case Transposed(inner):
            lying = _encode(inner, turned(shown, inner), path + "inner_", out)
            return {"node": "transposed", "shape": size, "inner": lying}
        case Sum(parts):
            encoded = [_encode(part, shown, f"{path}{i}_", out) for i, part in enumerate(parts)]
            return {"node": "sum", "parts": encoded}
    raise unknown("encode", w)


def decode_node(
    header: dict[str, Any], tensors: Mapping[str, Tensor], path: str, shown: Tensor | None = None
) -> Weight:
    """The node whose tensors have paths that start with `path`; codes may also be whole numbers in a float dtype, one
    each, as when they train."""
    match header["node"]:
        case "zero":
            return Zero((header["shape"][0], header["shape"][1]))
        case "dense":
            return Dense(expand(tensors[path + "values"], header["shape"], shown))
        case "grid":
            levels = header["levels"]
            count = math.prod(header["shape"]) if shown is None else int(shown.expand(header["shape"]).sum())
            stored = tensors[path + "codes"]
            whole = stored if stored.is_floating_point() else unpack(stored, levels, count)
            codes = expand(whole, header["shape"], shown)
            scale = tensors[path + "scale"].reshape(header["scale"])
            packed = tensors[path + "zero"] if header["asymmetric"] else None
            zero = None if packed is None else unpack(packed, levels, scale.numel()).reshape(scale.shape)
            return Grid(codes, scale, zero, levels, header["group_size"])
        case "trellis":
            trellis = Trellis(header["bits"], header["values"], header["memory"])
            count = math.prod(header["shape"]) // trellis.values
            codes = unpack(tensors[path + "codes"], 1 << trellis.bits, count)
            return TrellisCoded(codes, tensors[path + "scale"].reshape(-1, 1), trellis, header["run"])
        case "codebook":
            (rows, width), length = header["shape"], header["length"]
            vectors = -(-width // length)
            codes = unpack(tensors[path + "codes"], header["entries"], rows * vectors).reshape(rows, vectors)
            centroids = tensors[path + "centroids"].reshape(-1, length)
            return Codebook(codes, centroids, tensors[path + "scale"].reshape(-1, 1), width)
        case "low_rank":
            left = decode_node(header["left"], tensors, path + "left_", None)
            return LowRank(left, decode_node(header["right"], tensors, path + "right_", None))
        case "where":
            index = _decode_index(header["index"], header["shape"], tensors[path + "index"])
            inside = decode_node(header["inside"], tensors, path + "inside_", both(shown, index.inside))
            outside = decode_node(header["outside"], tensors, path + "outside_", both(shown, ~index.inside))
            return Where(index, inside, outside)
        case "rotated":
            inner = decode_node(header["inner"], tensors, path + "inner_", None)
            signs = unpack(tensors[path + "signs"], 2, shape(inner)[1]).bool()
            return Rotated(inner, signs, header["block"])
        case "scaled":
            inner = decode_node(header["inner"], tensors, path + "inner_", shown)
            return Scaled(inner, tensors[path + "columns"])
        case "transposed":
            lying = None if shown is None else shown.expand(header["shape"]).T
            return Transposed(decode_node(header["inner"], tensors, path + "inner_", lying))
        case "sum":
            parts = enumerate(header["parts"])
            return Sum(tuple(decode_node(part, tensors, f"{path}{i}_", shown) for i, part in parts))
    raise TypeError(f"no weight node is called {header['node']!r}")


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


def _decode_index(header: dict[str, Any], size: list[int], packed: Tensor) -> Index:
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


@lru_cache(maxsize=16)
def pattern_tables(kept: int, group: int) -> tuple[Tensor, Tensor]:
    """(rank of every `group`-bit number with `kept` ones, uint8 [2^group]; the patterns by rank, bool [C, group])."""
    if math.comb(group, kept) > 256:
        raise ValueError(f"{kept}:{group} has {math.comb(group, kept)} patterns; at most 256 fit in a byte")
    chosen = list(itertools.combinations(range(group), kept))
    patterns = torch.zeros(len(chosen), group, dtype=torch.bool)
    ranks = torch.zeros(2**group, dtype=torch.uint8)
    for rank, columns in enumerate(chosen):
        patterns[rank, list(columns)] = True
        ranks[sum(1 << column for column in columns)] = rank
    return ranks, patterns


def _compact(leaf: Tensor, shown: Tensor | None) -> Tensor:
    return leaf.reshape(-1).contiguous() if shown is None else leaf[shown.expand(leaf.shape)]


def expand(stored: Tensor, size: list[int], shown: Tensor | None) -> Tensor:
    """Stored elements back at their places; zeros where nothing is shown."""
    if shown is None:
        return stored.reshape(size)
    full = torch.zeros(size, dtype=stored.dtype, device=stored.device)
    full[shown.expand(size)] = stored
    return full
