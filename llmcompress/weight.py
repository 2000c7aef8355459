"""What a compressed weight is: a small algebra of nodes, and one recursion per question about them.

Every node stands for a matrix `[out, in]`. A method builds an expression; its size (`bits`), its disk form
(`encode`, `decode`), its value (`dense`) and its product with activations (`matmul`) follow from here.

`Where` selects element by element, so both its sides have the full shape; what a side does not show is not
stored: `bits` and `encode` hand the selection (`shown`, true = stored) down to the leaves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from llmcompress.packing import pack, packed_bits, unpack
from llmcompress.rotation import rotate_inputs, unrotate


@dataclass(frozen=True, eq=False)
class Zero:
    """All zeros; stores nothing."""

    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Dense:
    """Values kept as they are, in their own float dtype: `[out, in]`."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Grouped affine integers: `(code - zero) * scale`, one scale per row and group of input columns.

    `codes` uint8 `[out, in]` in [0, levels); `scale` float16 `[out or 1, groups]`; `zero` uint8 like `scale`, or
    None for the symmetric grid centred at (levels - 1) / 2. Two symmetric levels are +-scale/2, three are ternary.
    The last group is shorter where `group_size` does not divide the width.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    levels: int
    group_size: int


@dataclass(frozen=True, eq=False)
class LowRank:
    """`left [out, rank] @ right [rank, in]`; the factors are weights themselves."""

    left: Weight
    right: Weight


@dataclass(frozen=True, eq=False)
class Columns:
    """Selects whole input columns: `inside` bool `[in]`; stored as one bit a column."""

    inside: Tensor


@dataclass(frozen=True, eq=False)
class Bitmap:
    """Selects single elements: `inside` bool `[out, in]`; stored as one bit an element."""

    inside: Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """Selects exactly `kept` of every `group` consecutive columns of a row; stored as the number of the pattern."""

    inside: Tensor
    kept: int
    group: int


Index = Columns | Bitmap | Pattern


@dataclass(frozen=True, eq=False)
class Where:
    """`inside` where the index selects, `outside` elsewhere."""

    index: Index
    inside: Weight
    outside: Weight


@dataclass(frozen=True, eq=False)
class Rotated:
    """`inner` in a rotated input basis: the matrix is `inner @ R.T`, with R of `rotate(x) = x @ R`."""

    inner: Weight
    signs: Tensor  # bool [in], true = +1
    block: int  # Hadamard size: a power of two that divides the width


@dataclass(frozen=True, eq=False)
class Sum:
    """Parts added."""

    parts: tuple[Weight, ...]


Weight = Zero | Dense | Grid | LowRank | Where | Rotated | Sum


def shape(w: Weight) -> tuple[int, int]:
    """`(out, in)` of the matrix that `w` stands for."""
    match w:
        case Zero(size):
            return size
        case Dense(values):
            return values.shape[0], values.shape[1]
        case Grid(codes=codes):
            return codes.shape[0], codes.shape[1]
        case LowRank(left, right):
            return shape(left)[0], shape(right)[1]
        case Where(inside=inner) | Rotated(inner):
            return shape(inner)
        case Sum(parts):
            return shape(parts[0])
    raise _unknown("shape", w)


def dense(w: Weight) -> Tensor:
    """The matrix, float32 `[out, in]`; the same bits on every call."""
    match w:
        case Zero(size):
            return torch.zeros(size)
        case Dense(values):
            return values.float()
        case Grid(codes, scale, zero, levels, group_size):
            centre = (levels - 1) / 2 if zero is None else _spread(zero.float(), group_size, codes.shape[1])
            steps = _spread(scale.float(), group_size, codes.shape[1])
            if codes.is_floating_point():
                return (codes - centre) * steps
            return codes.float().sub_(centre).mul_(steps)
        case LowRank(left, right):
            return dense(left) @ dense(right)
        case Where(index, inside, outside):
            device = index.inside.device  # a Zero side lives nowhere
            return torch.where(index.inside, dense(inside).to(device), dense(outside).to(device))
        case Rotated(inner, signs, block):
            return unrotate(dense(inner), signs, block)
        case Sum(parts):
            return reduce(torch.add, [dense(part) for part in parts])
    raise _unknown("dense", w)


def matmul(x: Tensor, w: Weight) -> Tensor:
    """`x [..., in] @ dense(w).T`, in x's dtype, without building what can be applied in parts."""
    match w:
        case LowRank(left, right):
            return matmul(matmul(x, right), left)
        case Rotated(inner, signs, block):
            return matmul(rotate_inputs(x, signs, block), inner)
        case Sum(parts):
            return reduce(torch.add, [matmul(x, part) for part in parts])
        case _:
            return torch.nn.functional.linear(x, dense(w).to(x.dtype))


def decoded(w: Weight) -> Weight:
    """The same matrix with packed leaves and rotations as `Dense`: more memory, faster, equal up to rounding."""
    match w:
        case LowRank(left, right):
            return LowRank(decoded(left), decoded(right))
        case Sum(parts):
            return Sum(tuple(decoded(part) for part in parts))
        case _:
            return Dense(dense(w))


def bits(w: Weight, shown: Tensor | None = None) -> int:
    """Every stored bit: codes, scales, zero points, index sets, factors, signs. `shown` limits leaves (see `Where`)."""
    match w:
        case Zero():
            return 0
        case Dense(values):
            return _count(values, shown) * values.element_size() * 8
        case Grid(codes, scale, zero, levels):
            parameters = scale.numel() * 16 + (0 if zero is None else packed_bits(levels, zero.numel()))
            return packed_bits(levels, _count(codes, shown)) + parameters
        case LowRank(left, right):
            return bits(left) + bits(right)
        case Where(index, inside, outside):
            here = _both(shown, index.inside)
            return _index_bits(index) + bits(inside, here) + bits(outside, _both(shown, ~index.inside))
        case Rotated(inner, signs):
            return bits(inner) + signs.numel()
        case Sum(parts):
            return sum(bits(part, shown) for part in parts)
    raise _unknown("bits", w)


def describe(w: Weight) -> str:
    """One line for people, e.g. `rotated 64 (3-bit grid, row) + rank 16`."""
    match w:
        case Zero():
            return "zero"
        case Dense(values):
            return str(values.dtype).removeprefix("torch.")
        case Grid(codes, _, zero, levels, group_size):
            name = {2: "binary", 3: "ternary"}.get(levels, f"{math.log2(levels):.3g}-bit")
            group = "row" if group_size >= codes.shape[1] else f"g{group_size}"
            return f"{name} {group}{'' if zero is None else ' asymmetric'}"
        case LowRank(left, right):
            return f"rank {shape(left)[1]} ({describe(left)} | {describe(right)})"
        case Where(index, inside, outside):
            kind = f"{index.kept}:{index.group}" if isinstance(index, Pattern) else type(index).__name__.lower()
            share = index.inside.float().mean().item()
            return f"{share:.0%} of {kind}: {describe(inside)}, else {describe(outside)}"
        case Rotated(inner, _, block):
            return f"rotated {block} ({describe(inner)})"
        case Sum(parts):
            return " + ".join(describe(part) for part in parts)
    raise _unknown("describe", w)


# --- disk form ------------------------------------------------------------------------------------------------------


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
        case LowRank(left, right):
            parts = [_encode(left, None, path + "left_", out), _encode(right, None, path + "right_", out)]
            return {"node": "low_rank", "left": parts[0], "right": parts[1]}
        case Where(index, inside, outside):
            header: dict[str, Any] = {"node": "where", "shape": size, "index": _encode_index(index, path, out)}
            header["inside"] = _encode(inside, _both(shown, index.inside), path + "inside_", out)
            header["outside"] = _encode(outside, _both(shown, ~index.inside), path + "outside_", out)
            return header
        case Rotated(inner, signs, block):
            header = {"node": "rotated", "block": block, "inner": _encode(inner, None, path + "inner_", out)}
            out[path + "signs"] = pack(signs.to(torch.uint8), 2)
            return header
        case Sum(parts):
            encoded = [_encode(part, shown, f"{path}{i}_", out) for i, part in enumerate(parts)]
            return {"node": "sum", "parts": encoded}
    raise _unknown("encode", w)


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
        case "low_rank":
            left = decode_node(header["left"], tensors, path + "left_", None)
            return LowRank(left, decode_node(header["right"], tensors, path + "right_", None))
        case "where":
            index = _decode_index(header["index"], header["shape"], tensors[path + "index"])
            inside = decode_node(header["inside"], tensors, path + "inside_", _both(shown, index.inside))
            outside = decode_node(header["outside"], tensors, path + "outside_", _both(shown, ~index.inside))
            return Where(index, inside, outside)
        case "rotated":
            inner = decode_node(header["inner"], tensors, path + "inner_", None)
            signs = unpack(tensors[path + "signs"], 2, shape(inner)[1]).bool()
            return Rotated(inner, signs, header["block"])
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
    raise _unknown("encode", index)


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


def _index_bits(index: Index) -> int:
    if isinstance(index, Pattern):
        return packed_bits(math.comb(index.group, index.kept), index.inside.numel() // index.group)
    return index.inside.numel()


def _count(leaf: Tensor, shown: Tensor | None) -> int:
    """How many elements of a leaf are stored."""
    return leaf.numel() if shown is None else int(shown.expand(leaf.shape).sum())


def _compact(leaf: Tensor, shown: Tensor | None) -> Tensor:
    return leaf.reshape(-1).contiguous() if shown is None else leaf[shown.expand(leaf.shape)]


def expand(stored: Tensor, size: list[int], shown: Tensor | None) -> Tensor:
    """Stored elements back at their places; zeros where nothing is shown."""
    if shown is None:
        return stored.reshape(size)
    full = torch.zeros(size, dtype=stored.dtype, device=stored.device)
    full[shown.expand(size)] = stored
    return full


def _both(shown: Tensor | None, selected: Tensor) -> Tensor:
    return selected if shown is None else shown & selected


def _spread(groups: Tensor, group_size: int, width: int) -> Tensor:
    """Per-group numbers `[rows, groups]` repeated to `[rows, width]`; broadcast where one group spans the row."""
    return groups if groups.shape[1] == 1 else groups.repeat_interleave(group_size, 1)[:, :width]


def _unknown(question: str, node: object) -> TypeError:
    return TypeError(f"{question} has no rule for {type(node).__name__}; every node needs one")
