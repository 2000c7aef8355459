"""Inputs, layers and every kind of compressed weight that several tests build. Seeded, small, no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

import llmcompress.methods  # noqa: F401  (registers them)
from llmcompress.methods.layer import Layer, apply, step
from llmcompress.methods.moments import STATISTICS, Moments
from llmcompress.weight.expression import float_values
from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Columns,
    Dense,
    FloatFormat,
    Grid,
    LowRank,
    Minifloat,
    Pattern,
    RotatedInputs,
    ScaledInputs,
    ScaleFormat,
    Sum,
    Superblocks,
    Tiles,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    Zero,
)
from llmcompress.weight.superblocks import LAYOUTS, SuperblockForm, pack_superblocks, unpack_superblocks
from llmcompress.weight.trellis import Trellis

TRELLISES = (
    Trellis(1, 1, 8),
    Trellis(2, 1, 10),
    Trellis(3, 1, 7),
    Trellis(3, 2, 9),
    Trellis(7, 2, 14),
    Trellis(2, 1, 10, "linear"),
    Trellis(3, 2, 8, "linear"),
)
RINGS = (Trellis(2, 1, 10, "linear", ring=True), Trellis(3, 2, 9, ring=True))
LEVELS = (2, 3, 4, 5, 8, 16, 100, 256)
FLOATS: tuple[FloatFormat, ...] = ("e2m1", "e2m3", "e3m2", "e4m3")
SCALES: tuple[ScaleFormat, ...] = ("e8m0", "e4m3", "bfloat16")


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


# --- layers ---------------------------------------------------------------------------------------------------------


def correlated(tokens: int, width: int, seed: int = 0, basis: int = 0) -> Tensor:
    """Inputs `[tokens, width]` as layers see them: few strong directions (1/k) and channels of unlike size.

    The same covariance for one `basis`, other tokens for another `seed`.
    """
    random = seeded(1000 + basis)
    mixing = torch.randn(width, width, generator=random)
    channels = (0.8 * torch.randn(width, generator=random)).exp()
    spectrum = torch.arange(1, width + 1).float().reciprocal().sqrt()
    return (torch.randn(tokens, width, generator=seeded(seed)) * spectrum) @ mixing * channels


def gaussian(out: int, width: int, seed: int = 0) -> Tensor:
    """A weight `[out, width]` of standard normal entries with a few large ones, as trained weights have."""
    weight = torch.randn(out, width, generator=seeded(seed)) * 0.05
    large = torch.rand(out, width, generator=seeded(seed + 1)) < 0.02
    return torch.where(large, weight * 5, weight)


def moments(inputs: Tensor) -> Moments:
    """Every statistic of `inputs [tokens, width]`."""
    return Moments.of(inputs, STATISTICS, dense_inputs=inputs)


def layer(weight: Tensor, inputs: Tensor, seed: int = 0) -> Layer:
    """A layer nobody has touched."""
    return Layer("block.0.linear", weight, Dense(weight.to(torch.bfloat16)), moments(inputs), seed=str(seed))


def compressed(weight: Tensor, inputs: Tensor, *steps: dict[str, Any]) -> Layer:
    """The layer after `steps`, spelled as in a recipe."""
    return apply(layer(weight, inputs), [step(arguments) for arguments in steps])


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a dataclass or tuple, and within these."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value if isinstance(value, tuple) else vars(value).values() if is_dataclass(value) else ()
    return sum(map(tensor_bytes, parts))


def payload_bits(tensors: dict[str, Tensor]) -> int:
    """Bits that `encode`'s tensors occupy on disk."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())


# --- weights --------------------------------------------------------------------------------------------------------


def grid(size: Sequence[int], levels: int, group_size: int, seed: int, symmetric: bool, one_row: bool = False) -> Grid:
    """A grid with random codes and scales; `one_row`: all rows share their scales."""
    random = seeded(seed)
    out, width = size
    group_size = min(group_size, width)
    parameters = (1 if one_row else out, -(-width // group_size))
    codes = torch.randint(levels, (out, width), generator=random, dtype=torch.uint8)
    scale = (torch.rand(parameters, generator=random) + 0.1).half()
    zero = None if symmetric else torch.randint(levels, parameters, generator=random, dtype=torch.uint8)
    return Grid(codes, scale, zero, levels, group_size)


def streams(trellis: Trellis, steps: int, width: int, run: int) -> TrellisCodes:
    """Random streams of a trellis."""
    codes = torch.randint(1 << trellis.bits, (steps * width,), generator=seeded(steps), dtype=torch.uint8)
    scale = torch.rand(steps * trellis.values, 1, generator=seeded(width)) + 0.1
    return TrellisCodes(codes, scale.half(), trellis, run)


def tiles(bits: int, seed: int) -> Tiles:
    """The smallest tiles of EXL3, random."""
    random = seeded(seed)
    codes = torch.randint(1 << bits, (8, 8, 256), generator=random, dtype=torch.uint8)
    inputs, outputs = (torch.randn(128, generator=random).half() for _ in range(2))
    return Tiles(codes, inputs, outputs, bits)


def superblocks(form: SuperblockForm, rows: int, count: int, seed: int) -> Superblocks:
    """Random superblocks of a type of llama.cpp, `count` a row."""
    octets = torch.randint(256, (rows, count * LAYOUTS[form].bytes), generator=seeded(seed), dtype=torch.uint8)
    d = torch.randn(rows, count, 1, generator=seeded(seed)).half()
    return Superblocks(pack_superblocks(replace(unpack_superblocks(octets, form), d=d), form), form)


def codebook(size: Sequence[int], entries: int, length: int, seed: int) -> Codebook:
    """A codebook with random codes, entries and scales."""
    random = seeded(seed)
    out, width = size
    codes = torch.randint(entries, (out, -(-width // length)), generator=random, dtype=torch.uint8)
    centroids = torch.randn(entries, length, generator=random).half()
    return Codebook(codes, centroids, (torch.rand(out, 1, generator=random) + 0.1).half(), width)


def minifloat(
    size: Sequence[int], form: FloatFormat, scales: ScaleFormat, group_size: int, seed: int, of_all: bool = False
) -> Minifloat:
    """Floats of few bits with random codes and scales near 1; those with e4m3 scales have a factor of all as well, and
    `of_all` gives all rows the same scales."""
    random = seeded(seed)
    out, width = size
    finite = float_values(form).isfinite().nonzero()[:, 0].to(torch.uint8)
    codes = finite[torch.randint(len(finite), (out, width), generator=random)]
    groups = (1 if of_all else out, -(-width // group_size))
    if scales == "bfloat16":
        scale = torch.rand(groups, generator=random).add(0.5).bfloat16()
    else:
        one = int((float_values(scales) == 1).nonzero()[0])
        scale = torch.randint(one - 3, one + 3, groups, generator=random, dtype=torch.uint8)
    return Minifloat(codes, scale, torch.tensor([0.3]) if scales == "e4m3" else None, form, scales, group_size)


def pattern(size: Sequence[int], kept: int, group: int, seed: int) -> Pattern:
    """A random n:m choice."""
    scores = torch.rand(size[0], size[1] // group, group, generator=seeded(seed))
    inside = torch.zeros(scores.shape, dtype=torch.bool)
    inside.scatter_(2, scores.argsort(2)[..., :kept], True)
    return Pattern(inside.reshape(size[0], size[1]), kept, group)


def factors(width: int, seed: int) -> Tensor:
    """Positive float16 factors of columns `[width]`."""
    return (torch.rand(width, generator=seeded(seed)) + 0.25).half()


def every_node() -> list[Weight]:
    """Each node by itself, each index, each number of levels, ragged groups, a matrix of one element, empty sets."""
    random = seeded(0)

    def values(*size: int, dtype: torch.dtype = torch.float32) -> Dense:
        return Dense(torch.randn(*size, generator=random).to(dtype))

    size = (7, 24)
    half = torch.rand(size, generator=random) < 0.5
    nodes: list[Weight] = [Zero(size), Zero((1, 1)), values(1, 1)]
    nodes += [values(*size, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    nodes += [grid(size, levels, 24, levels, symmetric=True) for levels in LEVELS]
    nodes += [grid(size, levels, 8, levels, symmetric=False) for levels in LEVELS[1:]]
    nodes += [grid((5, 33), levels, 16, levels, symmetric) for levels in (2, 3, 8) for symmetric in (True, False)]
    nodes += [grid((1, 1), 4, 1, 0, symmetric=False), grid(size, 8, 7, 0, symmetric=True, one_row=True)]
    nodes += [streams(kind, steps, 24, run) for kind in TRELLISES for steps, run in ((7, 768), (50, 22), (1, 2))]
    nodes += [streams(kind, steps, 24, run) for kind in RINGS for steps, run in ((7, 768), (50, 22))]
    nodes += [tiles(bits, bits) for bits in (1, 3)]
    nodes += [superblocks("TQ2_0", 3, 2, 0)]  # the form whose table is not in another package
    nodes += [codebook(size, entries, length, entries) for entries, length in ((2, 1), (3, 2), (16, 4), (256, 8))]
    nodes += [codebook((5, 33), 6, 4, 0), codebook((1, 1), 256, 4, 0)]
    nodes += [minifloat(size, form, "e8m0", 8, 1) for form in FLOATS] + [minifloat(size, "e2m1", "e4m3", 16, 2)]
    nodes += [minifloat((1, 1), "e2m1", "e4m3", 32, 3), minifloat((5, 33), "e3m2", "e8m0", 16, 4)]
    nodes += [minifloat(size, "e4m3", "bfloat16", 24, 7, of_all) for of_all in (False, True)]
    nodes += [
        LowRank(values(7, 2), values(2, 24)),
        LowRank(grid((7, 3), 16, 3, 1, True), grid((3, 24), 16, 8, 2, False)),
        LowRank(grid((7, 9), 2, 9, 5, True), ScaledInputs(grid((9, 24), 2, 24, 6, True), factors(24, 5))),
    ]
    nodes += [RotatedInputs(values(*size), torch.rand(24, generator=random) < 0.5, block) for block in (1, 4, 8)]
    nodes += [ScaledInputs(inner, factors(24, 1)) for inner in (values(*size), grid(size, 2, 8, 1, True), Zero(size))]
    nodes += [
        ScaledInputs(grid((1, 1), 2, 1, 0, True), factors(1, 2)),
        ScaledInputs(streams(TRELLISES[0], 7, 24, 22), factors(24, 3)),
    ]
    nodes += [
        Transpose(inner) for inner in (values(24, 7), grid((33, 5), 3, 2, 1, True), grid((24, 7), 8, 3, 2, False))
    ]
    nodes += [
        Where(Columns(half[0]), ScaledInputs(values(*size), factors(24, 4)), Transpose(grid((24, 7), 4, 3, 5, True)))
    ]
    nodes += [Sum((values(*size),)), Sum((grid(size, 2, 24, 3, True), grid(size, 2, 24, 4, True), values(*size)))]
    for index in (
        Columns(half[0]),
        Bitmap(half),
        pattern(size, 2, 4, 0),
        pattern(size, 1, 8, 1),
        pattern(size, 2, 3, 2),
    ):
        nodes.append(Where(index, grid(size, 256, 24, 5, symmetric=True), grid(size, 2, 8, 6, symmetric=True)))
        nodes.append(Where(index, values(*size, dtype=torch.bfloat16), Zero(size)))
        nodes.append(Where(index, minifloat(size, "e4m3", "e8m0", 8, 5), minifloat(size, "e2m1", "e4m3", 16, 6)))
        nodes.append(Where(index, values(*size, dtype=torch.bfloat16), codebook(size, 16, 4, 1)))
    nodes += [Where(Bitmap(half), streams(TRELLISES[0], 7, 24, 22), streams(TRELLISES[1], 7, 24, 768))]
    for inside in (torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)):
        nodes.append(Where(Bitmap(inside), grid(size, 3, 24, 7, symmetric=True), values(*size)))
    return nodes


def random_nestings(seed: int, count: int, depth: int = 4) -> list[Weight]:
    """Random expressions; widths that divide by 4 (for patterns and rotations) and some that do not."""
    random = seeded(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=random))

    def build(size: tuple[int, int], depth: int) -> Weight:
        out, width = size
        even = width % 4 == 0
        match draw(5 if depth == 0 else 13):
            case 0:
                return Zero(size)
            case 1:
                dtype = (torch.float32, torch.float16, torch.bfloat16)[draw(3)]
                return Dense(torch.randn(size, generator=random).to(dtype))
            case 2:
                return grid(size, LEVELS[draw(len(LEVELS))], 1 + draw(width), draw(10**6), symmetric=draw(2) == 0)
            case 3:
                return codebook(size, 2 + draw(30), 1 + draw(5), draw(10**6))
            case 4:
                form, scales = FLOATS[draw(4)], SCALES[draw(3)]
                return minifloat(size, form, scales, 1 + draw(width), draw(10**6), of_all=draw(2) == 0)
            case 5 | 6:
                rank = 1 + draw(3)
                return LowRank(build((out, rank), depth - 1), build((rank, width), depth - 1))
            case 7:
                return RotatedInputs(
                    build(size, depth - 1), torch.rand(width, generator=random) < 0.5, 4 if even else 1
                )
            case 8:
                return ScaledInputs(build(size, depth - 1), factors(width, draw(10**6)))
            case 9:
                return Transpose(build((width, out), depth - 1))
            case 10:
                return Sum(tuple(build(size, depth - 1) for _ in range(1 + draw(3))))
            case _:
                inside = torch.rand(size, generator=random) < 0.3
                indices = [Columns(inside[0]), Bitmap(inside)] + ([pattern(size, 2, 4, draw(10**6))] if even else [])
                index = indices[draw(len(indices))]
                return Where(index, build(size, depth - 1), build(size, depth - 1))

    return [build((1 + draw(9), (1 + draw(9)) * (4 if draw(2) else 1)), depth) for _ in range(count)]
