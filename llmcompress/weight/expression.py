"""What a compressed weight is worth: one recursion per question about its nodes.

Its size is `bits`, its value `dense`, its product with activations `matmul`; its disk form is made by `encoding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from llmcompress.weight.hadamard import rotate_inputs, unrotate
from llmcompress.weight.nodes import (
    Codebook,
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
from llmcompress.weight.packing import packed_bits
from llmcompress.weight.trellis import matrix


def device(w: Weight) -> torch.device | None:
    """Where the tensors of `w` are; None where there are none, as in `Zero`."""
    match w:
        case Zero():
            return None
        case Dense(tensor) | Grid(tensor) | TrellisCoded(tensor) | Codebook(tensor) | Scaled(columns=tensor):
            return tensor.device
        case Where(index):
            return index.inside.device
        case Rotated(signs=signs):
            return signs.device
        case Transposed(inner):
            return device(inner)
        case LowRank(left, right):
            return device(left) or device(right)
        case Sum(parts):
            return next(filter(None, map(device, parts)), None)
    raise unknown("device", w)


def dense(w: Weight, where: torch.device | None = None) -> Tensor:
    """The matrix, float32 `[out, in]`; the same bits on every call. What has no tensor goes to device `where`, by
    default to that of the others."""
    where = device(w) if where is None else where
    match w:
        case Zero(size):
            return torch.zeros(size, device=where)
        case Dense(values):
            return values.float()
        case Grid(codes, scale, zero, levels, group_size):
            centre = (levels - 1) / 2 if zero is None else _spread(zero.float(), group_size, codes.shape[1])
            steps = _spread(scale.float(), group_size, codes.shape[1])
            if codes.is_floating_point():
                return (codes - centre) * steps
            return codes.float().sub_(centre).mul_(steps)
        case TrellisCoded(codes, scale, trellis, run):
            return matrix(codes, len(scale), trellis, run) * scale.float()
        case Codebook(codes, centroids, scale, width):
            return centroids.float()[codes.long()].flatten(1)[:, :width] * scale.float()
        case LowRank(left, right):
            return dense(left, where) @ dense(right, where)
        case Where(index, inside, outside):
            return torch.where(index.inside, dense(inside, where), dense(outside, where))
        case Rotated(inner, signs, block):
            return unrotate(dense(inner, where), signs, block)
        case Scaled(inner, columns):
            return dense(inner, where) * columns.float()
        case Transposed(inner):
            return dense(inner, where).T.contiguous()
        case Sum(parts):
            return reduce(torch.add, [dense(part, where) for part in parts])
    raise unknown("dense", w)


def by_dense(x: Tensor, w: Weight) -> Tensor:
    """`x [..., in] @ dense(w).T`, in x's dtype."""
    return torch.nn.functional.linear(x, dense(w, x.device).to(x.dtype))


def matmul(x: Tensor, w: Weight, leaf: Callable[[Tensor, Weight], Tensor] = by_dense) -> Tensor:
    """`x [..., in] @ dense(w).T`, in x's dtype, without building what can be applied in parts; `leaf` multiplies what
    has none."""
    match w:
        case LowRank(left, right):
            return matmul(matmul(x, right, leaf), left, leaf)
        case Rotated(inner, signs, block):
            return matmul(rotate_inputs(x, signs, block), inner, leaf)
        case Scaled(inner, columns):
            return matmul((x * columns).to(x.dtype), inner, leaf)
        case Sum(parts):
            return reduce(torch.add, [matmul(x, part, leaf) for part in parts])
        case _:
            return leaf(x, w)


def decoded(w: Weight) -> Weight:
    """The same matrix with packed leaves and rotations as `Dense`: more memory, faster, equal up to rounding."""
    match w:
        case Zero():
            return w
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
        case TrellisCoded(codes, scale, trellis) if shown is None:
            return codes.numel() * trellis.bits + scale.numel() * 16
        case Codebook(codes, centroids, scale):
            return packed_bits(len(centroids), codes.numel()) + (centroids.numel() + scale.numel()) * 16
        case LowRank(left, right):
            return bits(left) + bits(right)
        case Where(index, inside, outside):
            here = both(shown, index.inside)
            return _index_bits(index) + bits(inside, here) + bits(outside, both(shown, ~index.inside))
        case Rotated(inner, signs):
            return bits(inner) + signs.numel()
        case Scaled(inner, columns):
            return bits(inner, shown) + columns.numel() * 16
        case Transposed(inner):
            return bits(inner, turned(shown, inner))
        case Sum(parts):
            return sum(bits(part, shown) for part in parts)
    raise unknown("bits", w)


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
        case TrellisCoded(trellis=trellis):
            return f"{trellis.rate:g}-bit trellis"
        case Codebook(centroids=centroids):
            entries, length = centroids.shape
            return f"{entries} vectors of {length}" if length > 1 else f"{entries} points"
        case LowRank(left, right):
            return f"rank {shape(left)[1]} ({describe(left)} | {describe(right)})"
        case Where(index, inside, outside):
            kind = f"{index.kept}:{index.group}" if isinstance(index, Pattern) else type(index).__name__.lower()
            share = index.inside.float().mean().item()
            return f"{share:.0%} of {kind}: {describe(inside)}, else {describe(outside)}"
        case Rotated(inner, _, block):
            return f"rotated {block} ({describe(inner)})"
        case Scaled(inner):
            return f"scaled columns ({describe(inner)})"
        case Transposed(inner):
            return f"transposed ({describe(inner)})"
        case Sum(parts):
            return " + ".join(describe(part) for part in parts)
    raise unknown("describe", w)


def _index_bits(index: Index) -> int:
    if isinstance(index, Pattern):
        return packed_bits(math.comb(index.group, index.kept), index.inside.numel() // index.group)
    return index.inside.numel()


def _count(leaf: Tensor, shown: Tensor | None) -> int:
    """How many elements of a leaf are stored."""
    return leaf.numel() if shown is None else int(shown.expand(leaf.shape).sum())


def _spread(groups: Tensor, group_size: int, width: int) -> Tensor:
    """Per-group numbers `[rows, groups]` repeated to `[rows, width]`; broadcast where one group spans the row."""
    return groups if groups.shape[1] == 1 else groups.repeat_interleave(group_size, 1)[:, :width]
