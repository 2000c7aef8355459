"""What a compressed weight is: a small algebra of nodes, and one recursion per question about them.

Every node stands for a matrix `[out, in]`. A method builds an expression; its size (`bits`), its value (`dense`) and
its product with activations (`matmul`) follow from here, its disk form from `encoding`.

`Where` selects element by element, so both its sides have the full shape; what a side does not show is not
stored: `bits` hands the selection (`shown`, true = stored) down to the leaves. Only a `Codebook` stores all its codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from llmcompress.weight.hadamard import rotate_inputs, unrotate
from llmcompress.weight.packing import packed_bits
from llmcompress.weight.trellis import Trellis, matrix


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
class TrellisCoded:
    """Numbers of a trellis times a scale a row.

    `codes` uint8 `[out * in / trellis.values]`, flat, as `trellis.matrix` reads them; `scale` float16 `[out, 1]`.
    """

    codes: Tensor
    scale: Tensor
    trellis: Trellis
    run: int  # rows that a stream goes down


@dataclass(frozen=True, eq=False)
class Codebook:
    """Vectors of consecutive input columns, each an entry of one small table, times a scale a row.

    `codes` uint8 `[out, vectors]` number the entries; `centroids` float16 `[entries, length]`, at most 256 entries, of
    single weights where the length is 1; `scale` float16 `[out, 1]`. The last vector of a row shows only its first
    columns where the length does not divide the `width`.
    """

    codes: Tensor
    centroids: Tensor
    scale: Tensor
    width: int


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
class Scaled:
    """`inner * columns`: a factor for every input column, float16 `[in]`."""

    inner: Weight
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Transposed:
    """`inner.T`, of an inner `[in, out]`: groups of a grid in it go along the output."""

    inner: Weight


@dataclass(frozen=True, eq=False)
class Sum:
    """Parts added."""

    parts: tuple[Weight, ...]


Weight = Zero | Dense | Grid | TrellisCoded | Codebook | LowRank | Where | Rotated | Scaled | Transposed | Sum


def shape(w: Weight) -> tuple[int, int]:
    """`(out, in)` of the matrix that `w` stands for."""
    match w:
        case Zero(size):
            return size
        case Dense(values):
            return values.shape[0], values.shape[1]
        case Grid(codes=codes):
            return codes.shape[0], codes.shape[1]
        case TrellisCoded(codes, scale, trellis):
            return scale.shape[0], codes.numel() * trellis.values // scale.shape[0]
        case Codebook(codes, width=width):
            return codes.shape[0], width
        case LowRank(left, right):
            return shape(left)[0], shape(right)[1]
        case Where(inside=inner) | Rotated(inner) | Scaled(inner):
            return shape(inner)
        case Transposed(inner):
            return shape(inner)[1], shape(inner)[0]
        case Sum(parts):
            return shape(parts[0])
    raise unknown("shape", w)


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


def both(shown: Tensor | None, selected: Tensor) -> Tensor:
    """What of `shown` (None: everything) is selected too."""
    return selected if shown is None else shown & selected


def turned(shown: Tensor | None, inner: Weight) -> Tensor | None:
    """What is shown of `Transposed(inner)`, as `inner` lies."""
    return None if shown is None else shown.expand(*reversed(shape(inner))).T


def _spread(groups: Tensor, group_size: int, width: int) -> Tensor:
    """Per-group numbers `[rows, groups]` repeated to `[rows, width]`; broadcast where one group spans the row."""
    return groups if groups.shape[1] == 1 else groups.repeat_interleave(group_size, 1)[:, :width]


def unknown(question: str, node: object) -> TypeError:
    """The error of a recursion that meets a node it has no rule for."""
    return TypeError(f"{question} has no rule for {type(node).__name__}; every node needs one")
