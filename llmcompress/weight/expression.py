"""Questions about a compressed weight, one recursion over its nodes each.

`bits` is its size, `dense` its value, `matmul` its product with activations. `encoding` has its disk form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from llmcompress.weight.constants import constant
from llmcompress.weight.hadamard import rotate, unrotate
from llmcompress.weight.nodes import (
    Codebook,
    Dense,
    FloatFormat,
    Grid,
    Index,
    LowRank,
    Minifloat,
    Pattern,
    RotatedInputs,
    ScaledInputs,
    Sum,
    Superblocks,
    Tiles,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    children,
    float_codes,
    rebuild,
    shape,
    shown_count,
    stored_tensors,
    unknown,
)
from llmcompress.weight.packing import packed_bits
from llmcompress.weight.superblocks import superblock_matrix
from llmcompress.weight.tiles import matrix as tiled_matrix
from llmcompress.weight.trellis import matrix


def device(w: Weight) -> torch.device | None:
    """Return the device of the tensors of `w`; None if it has no tensors, as `Zero`."""
    if isinstance(w, Where):
        return w.index.inside.device
    own = (part.tensor.device for part in stored_tensors(w))
    below = (device(node) for _, node, _ in children(w))
    return next(filter(None, chain(own, below)), None)


def dense(w: Weight, where: torch.device | None = None) -> Tensor:
    """Return the matrix, float32 `[out, in]`; the same bits on every call.

    `where`: the device of parts without tensors, by default that of the others.
    """
    where = device(w) if where is None else where
    match w:
        case Zero(size):
            return torch.zeros(size, dtype=torch.float32, device=where)
        case Dense(values):
            return values.float()
        case Grid():
            return _grid_values(w)
        case TrellisCodes(codes, scale, trellis, run):
            return matrix(codes, len(scale), trellis, run).mul_(scale.float())
        case Tiles(codes, inputs, outputs, bits):
            return tiled_matrix(codes, bits, inputs, outputs)
        case Superblocks(codes, form):
            return superblock_matrix(codes, form)
        case Codebook(codes, centroids, scale, width):
            return centroids.float()[codes.long()].flatten(1)[:, :width] * scale.float()
        case Minifloat(codes, form=form, group_size=group_size):
            steps = repeat_groups(float_steps(w), group_size, codes.shape[1])
            return float_values(form).to(codes.device)[codes.long()] * steps
        case LowRank(left, right):
            return dense(left, where) @ dense(right, where)
        case Where(index, inside, outside):
            return torch.where(index.inside, dense(inside, where), dense(outside, where))
        case RotatedInputs(inner, signs, block):
            return unrotate(dense(inner, where), signs, block, reuse=isinstance(inner, Grid | TrellisCodes))
        case ScaledInputs(inner, columns):
            return dense(inner, where) * columns.float()
        case Transpose(inner):
            return dense(inner, where).T.contiguous()
        case Sum(parts):
            return reduce(torch.add, [dense(part, where) for part in parts])
    raise unknown("dense", w)


def _grid_values(w: Grid) -> Tensor:
    """Return the numbers of a grid, float32 `[out, in]`; those of whole groups in no more memory than they take."""
    width, size = w.codes.shape[1], min(w.group_size, w.codes.shape[1])
    if width % size == 0 and not w.codes.is_floating_point():
        values = w.codes.float()
        groups = values.unflatten(1, (-1, size))
        centre = (w.levels - 1) / 2 if w.zero is None else w.zero.float()[..., None]
        groups.sub_(centre).mul_(w.scale.float()[..., None])
        return values
    centre = (w.levels - 1) / 2 if w.zero is None else repeat_groups(w.zero.float(), w.group_size, width)
    return (w.codes.float() - centre) * repeat_groups(w.scale.float(), w.group_size, width)


def float_steps(w: Minifloat) -> Tensor:
    """Return the factors of the numbers of each group, float32 `[out or 1, groups]`."""
    known = w.scale.float() if w.scales == "bfloat16" else float_values(w.scales).to(w.scale.device)[w.scale.long()]
    return known if w.tensor_scale is None else known * w.tensor_scale


@constant
def float_values(form: FloatFormat) -> Tensor:
    """Return the numbers of a format by code, float32 `[codes]`, as in the OCP Microscaling specification 1.0.

    A code holds a sign s, then e bits of exponent x, then m bits of mantissa y, the lowest. Its number is
    (-1)^s 2^(x - b) (1 + y / 2^m), or (-1)^s 2^(1 - b) y / 2^m for x = 0, with the bias b = 2^(e - 1) - 1. The largest
    are 6 (e2m1), 7.5 (e2m3), 28 (e3m2) and 448 (e4m3, whose last code of either sign is NaN). e8m0 has no sign and no
    mantissa: 2^(code - 127), and NaN for 255.
    """
    if form == "e8m0":
        return torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan], dtype=torch.float32)
    width = int(form[3])
    codes = torch.arange(float_codes(form) // 2)
    exponent, mantissa = codes >> width, codes & ((1 << width) - 1)
    significand = mantissa + torch.where(exponent > 0, 1 << width, 0)
    bias = 2 ** (int(form[1]) - 1) - 1
    numbers = torch.ldexp(significand.float(), exponent.clamp_min(1) - bias - width)
    if form == "e4m3":
        numbers[-1] = math.nan
    return torch.cat([numbers, -numbers])


def by_dense(x: Tensor, w: Weight) -> Tensor:
    """Return `x [..., in] @ dense(w).T`, in x's dtype, or in that of autocast."""
    weight, kind = w.values if isinstance(w, Dense) else dense(w, x.device), x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.nn.functional.linear(x, weight if casts else weight.to(x.dtype))


def matmul(x: Tensor, w: Weight, leaf: Callable[[Tensor, Weight], Tensor] = by_dense) -> Tensor:
    """Return `x [..., in] @ dense(w).T`, in x's dtype, part by part; `leaf` multiplies nodes without parts."""
    match w:
        case LowRank(left, right):
            return matmul(matmul(x, right, leaf), left, leaf)
        case RotatedInputs(inner, signs, block):
            return matmul(rotate(x, signs, block), inner, leaf)
        case ScaledInputs(inner, columns):
            return matmul((x * columns).to(x.dtype), inner, leaf)
        case Sum(parts):
            return reduce(torch.add, [matmul(x, part, leaf) for part in parts])
        case _:
            return leaf(x, w)


def decoded(w: Weight, dtype: torch.dtype = torch.float32) -> Weight:
    """Return the same matrix with packed leaves and rotations as `Dense`: more memory, faster, equal up to rounding."""
    match w:
        case Zero():
            return w
        case LowRank() | Sum():
            return rebuild(w, lambda path, node, shown: decoded(node, dtype))
        case _:
            return Dense(dense(w).to(dtype))


def bits(w: Weight, shown: Tensor | None = None) -> int:
    """Return the number of stored bits; `shown` limits leaves (see `children`)."""
    return sum(tensor_bits(w, shown))


def tensor_bits(w: Weight, shown: Tensor | None = None) -> Iterator[int]:
    """Yield the bits of each stored tensor of `w`, before its last byte is padded."""
    if isinstance(w, Where):
        yield _index_bits(w.index)
    for part in stored_tensors(w):
        yield part.bits(shown)
    for _, node, here in children(w, shown):
        yield from tensor_bits(node, here)


def not_zero(w: Weight) -> int:
    """Return the number of elements of `w` that are not pruned."""
    match w:
        case Zero():
            return 0
        case Where(index, inside, Zero()) if not isinstance(inside, Zero):
            return shown_count(index.inside, index.inside.shape)
        case ScaledInputs(inner) | Transpose(inner):
            return not_zero(inner)
        case _:
            return math.prod(shape(w))


def describe(w: Weight) -> str:
    """Return one line for people, e.g. `rotated 64 (3-bit row) + rank 16 (8-bit row | 8-bit row)`."""
    match w:
        case Zero():
            return "zero"
        case Dense(values):
            return str(values.dtype).removeprefix("torch.")
        case Grid(codes, _, zero, levels, group_size):
            name = {2: "binary", 3: "ternary"}.get(levels, f"{math.log2(levels):.3g}-bit")
            group = "row" if group_size >= codes.shape[1] else f"g{group_size}"
            return f"{name} {group}{'' if zero is None else ' asymmetric'}"
        case TrellisCodes(trellis=trellis):
            return f"{trellis.rate:g}-bit trellis"
        case Tiles(bits=bits):
            return f"{bits}-bit tiles"
        case Superblocks(form=form):
            return form
        case Codebook(centroids=centroids):
            entries, length = centroids.shape
            return f"{entries} vectors of {length}" if length > 1 else f"{entries} points"
        case Minifloat(codes, scale, _, form, scales, group_size):
            group = "row" if group_size >= codes.shape[1] else f"g{group_size}"
            group = f"{group} of all rows" if len(scale) < len(codes) else group
            return f"{form} floats {group}, scales {scales}"
        case LowRank(left, right):
            return f"rank {shape(left)[1]} ({describe(left)} | {describe(right)})"
        case Where(index, inside, outside):
            kind = f"{index.keep}:{index.group}" if isinstance(index, Pattern) else type(index).__name__.lower()
            share = shown_count(index.inside, index.inside.shape) / index.inside.numel()
            return f"{share:.0%} of {kind}: {describe(inside)}, else {describe(outside)}"
        case RotatedInputs(inner, _, block):
            return f"rotated {block} ({describe(inner)})"
        case ScaledInputs(inner):
            return f"scaled columns ({describe(inner)})"
        case Transpose(inner):
            return f"transposed ({describe(inner)})"
        case Sum(parts):
            return " + ".join(describe(part) for part in parts)
    raise unknown("describe", w)


def _index_bits(index: Index) -> int:
    if isinstance(index, Pattern):
        return packed_bits(math.comb(index.group, index.keep), index.inside.numel() // index.group)
    return index.inside.numel()


def repeat_groups(groups: Tensor, group_size: int, width: int) -> Tensor:
    """Return per-group numbers `[rows, groups]` repeated to `[rows, width]`; as they are for one group a row."""
    return groups if groups.shape[1] == 1 else groups.repeat_interleave(group_size, 1)[:, :width]
