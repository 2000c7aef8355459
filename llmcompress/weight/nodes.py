"""The nodes of which a compressed weight is built: a small algebra, each node a matrix `[out, in]`.

Methods build expressions of them; `expression` computes their values, `encoding` their disk form. Recursions descend
by `children` or `rebuild`, and count stored numbers by `stored_tensors`. So a new node takes a class and a rule in
`shape` and `stored_tensors` here, one in `dense` and `describe` there, and two in `encoding`.

`Where` selects element by element, so both its sides have the full shape. Elements that a side does not show are not
stored: the selection (`shown`, true = stored) goes down to the leaves. Codes of a `Codebook`, of `TrellisCodes`, of
`Tiles` and of `Superblocks` are always all stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.weight.packing import packed_bits
from llmcompress.weight.superblocks import LAYOUTS, SUPERBLOCK, SuperblockForm
from llmcompress.weight.tiles import SIDE
from llmcompress.weight.trellis import Trellis

FloatFormat = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e8m0"]  # bits of the exponent, bits of the mantissa
ScaleFormat = Literal["e4m3", "e8m0", "bfloat16"]


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
class TrellisCodes:
    """Numbers of a trellis times a scale a row.

    `codes` uint8 `[out * in / trellis.values]`, flat, as `trellis.matrix` reads them; `scale` float16 `[out, 1]`.
    """

    codes: Tensor
    scale: Tensor
    trellis: Trellis
    run: int  # rows that a stream goes down


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of 16 x 16 in tail-biting trellises, between Hadamard transforms and under factors: EXL3 (see `tiles`).

    `codes` uint8 `[in / 16, out / 16, 256]`, `bits` each; `inputs` float16 `[in]` and `outputs` float16 `[out]` have
    signs. Both sides are multiples of 128.
    """

    codes: Tensor
    inputs: Tensor
    outputs: Tensor
    bits: int


@dataclass(frozen=True, eq=False)
class Superblocks:
    """Vectors of llama.cpp's tables under small multiples of a scale of 256 columns, in its own bytes (`superblocks`).

    `codes` uint8 `[out, in / 256 * bytes]`, those of a tensor of GGUF's type `form`.
    """

    codes: Tensor
    form: SuperblockForm


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
class Minifloat:
    """Grouped floats of few bits with one scale per row and group of columns.

    `codes` uint8 `[out, in]` are numbers in the format `form`, `scale` uint8 `[out or 1, groups]` numbers in the format
    `scales`, both as `expression.float_values` lists them; bfloat16 scales are stored as such. `tensor_scale` float32
    `[1]` multiplies all of them, unless it is None. The last group is shorter where `group_size` does not divide the
    width.

    MXFP4, MXFP6 and MXFP8 (OCP Microscaling 1.0, arXiv 2310.10537) have groups of 32 and e8m0 scales; NVFP4 has groups
    of 16, e4m3 scales and a tensor scale; FP8 (arXiv 2209.05433) has e4m3 numbers and a bfloat16 scale a row, or one of
    all.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    form: FloatFormat
    scales: ScaleFormat
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
    """Selects exactly `keep` of every `group` consecutive columns of a row; stored as the number of the pattern."""

    inside: Tensor
    keep: int
    group: int


Index = Columns | Bitmap | Pattern


@dataclass(frozen=True, eq=False)
class Where:
    """`inside` where the index selects, `outside` elsewhere."""

    index: Index
    inside: Weight
    outside: Weight


@dataclass(frozen=True, eq=False)
class RotatedInputs:
    """`inner` in a rotated input basis: the matrix is `inner @ R.T`, with R of `rotate(x) = x @ R`."""

    inner: Weight
    signs: Tensor  # bool [in], true = +1
    block: int  # Hadamard size: a power of two that divides the width


@dataclass(frozen=True, eq=False)
class ScaledInputs:
    """`inner * columns`: a factor for every input column, float16 `[in]`."""

    inner: Weight
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Transpose:
    """`inner.T`, of an inner `[in, out]`: groups of a grid in it go along the output."""

    inner: Weight


@dataclass(frozen=True, eq=False)
class Sum:
    """Parts added."""

    parts: tuple[Weight, ...]


Weight = (
    Zero
    | Dense
    | Grid
    | TrellisCodes
    | Tiles
    | Superblocks
    | Codebook
    | Minifloat
    | LowRank
    | Where
    | RotatedInputs
    | ScaledInputs
    | Transpose
    | Sum
)


def shape(w: Weight) -> tuple[int, int]:
    """Return `(out, in)` of the matrix that `w` stands for."""
    match w:
        case Zero(size):
            return size
        case Dense(values):
            return values.shape[0], values.shape[1]
        case Grid(codes=codes) | Minifloat(codes=codes):
            return codes.shape[0], codes.shape[1]
        case TrellisCodes(codes, scale, trellis):
            return scale.shape[0], codes.numel() * trellis.values // scale.shape[0]
        case Tiles(codes):
            return SIDE * codes.shape[1], SIDE * codes.shape[0]
        case Superblocks(codes, form):
            return codes.shape[0], codes.shape[1] // LAYOUTS[form].bytes * SUPERBLOCK
        case Codebook(codes, width=width):
            return codes.shape[0], width
        case LowRank(left, right):
            return shape(left)[0], shape(right)[1]
        case Where(inside=inner) | RotatedInputs(inner) | ScaledInputs(inner):
            return shape(inner)
        case Transpose(inner):
            return shape(inner)[1], shape(inner)[0]
        case Sum(parts):
            return shape(parts[0])
    raise unknown("shape", w)


# --- what lies below a node -----------------------------------------------------------------------------------------

Child = tuple[str, Weight, Tensor | None]


def children(w: Weight, shown: Tensor | None = None) -> tuple[Child, ...]:
    """Return the nodes right below `w`, each as (path, node, shown).

    The names of all tensors of a child begin with its path. `shown`: the part of a node that is stored, bool,
    broadcasts to its shape; None for all of it.
    """
    match w:
        case LowRank(left, right):
            return ("left_", left, None), ("right_", right, None)
        case Where(index, inside, outside):
            return ("inside_", inside, both(shown, index.inside)), ("outside_", outside, both(shown, ~index.inside))
        case RotatedInputs(inner):
            return (("inner_", inner, None),)
        case ScaledInputs(inner):
            return (("inner_", inner, shown),)
        case Transpose(inner):
            lying = None if shown is None else shown.expand(*reversed(shape(inner))).T
            return (("inner_", inner, lying),)
        case Sum(parts):
            return tuple((f"{i}_", part, shown) for i, part in enumerate(parts))
        case Zero() | Dense() | Grid() | TrellisCodes() | Tiles() | Superblocks() | Codebook() | Minifloat():
            return ()
    raise unknown("children", w)


def rebuild(w: Weight, f: Callable[[str, Weight, Tensor | None], Weight], shown: Tensor | None = None) -> Weight:
    """Return `w` with `f(path, node, shown)` in the place of each of its `children`; a leaf as it is."""
    below = {path.removesuffix("_"): f(path, node, here) for path, node, here in children(w, shown)}
    return Sum(tuple(below.values())) if isinstance(w, Sum) else with_fields(w, below)


def with_fields(w: Weight, fields: Mapping[str, Any]) -> Weight:
    """Return `w` with other values in these fields; `w` itself if there are none."""
    return replace(w, **fields) if fields else w


# --- what a node stores ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that a node stores, the field `name`: packed codes in [0, levels), or numbers as they are (None).

    `per`: "element" for `[out, in]`, of which only shown elements are stored; "row" for `[out or 1, n]`; "run" for
    codes of runs of rows, one after the other; "node" for numbers that all rows share.
    """

    name: str
    tensor: Tensor
    levels: int | None = None
    per: Literal["element", "row", "run", "node"] = "row"

    def bits(self, shown: Tensor | None) -> int:
        """Return the stored bits, before the last byte is padded."""
        count = self.tensor.numel()
        if shown is not None and self.per == "element":
            count = shown_count(shown, self.tensor.shape)
        return packed_bits(self.levels, count) if self.levels else count * self.tensor.element_size() * 8

    def numbers(self, shown: Tensor | None) -> Tensor:
        """Return the stored numbers, flat."""
        if shown is None or self.per != "element":
            return self.tensor.reshape(-1)
        return self.tensor[shown.expand(self.tensor.shape)]


def float_codes(form: FloatFormat) -> int:
    """Return the number of codes of a format; all but e8m0, the powers of two, have a sign."""
    return 256 if form == "e8m0" else 2 << (int(form[1]) + int(form[3]))


def stored_tensors(w: Weight) -> tuple[StoredTensor, ...]:
    """Return the tensors of `w` itself, without those of its children and without the index of a `Where`."""
    match w:
        case Dense(values):
            return (StoredTensor("values", values, per="element"),)
        case Grid(codes, scale, zero, levels):
            zeros = () if zero is None else (StoredTensor("zero", zero, levels),)
            return StoredTensor("codes", codes, levels, "element"), StoredTensor("scale", scale), *zeros
        case TrellisCodes(codes, scale, trellis):
            return StoredTensor("codes", codes, 1 << trellis.bits, "run"), StoredTensor("scale", scale)
        case Tiles(codes, inputs, outputs, bits):
            factors = StoredTensor("inputs", inputs, per="node"), StoredTensor("outputs", outputs, per="node")
            return StoredTensor("codes", codes, 1 << bits, "node"), *factors
        case Superblocks(codes):
            return (StoredTensor("codes", codes),)
        case Codebook(codes, centroids, scale):
            table = StoredTensor("centroids", centroids, per="node")
            return StoredTensor("codes", codes, len(centroids)), table, StoredTensor("scale", scale)
        case Minifloat(codes, scale, tensor_scale, form):
            factor = () if tensor_scale is None else (StoredTensor("tensor_scale", tensor_scale, per="node"),)
            return StoredTensor("codes", codes, float_codes(form), "element"), StoredTensor("scale", scale), *factor
        case RotatedInputs(signs=signs):
            return (StoredTensor("signs", signs, 2, "node"),)
        case ScaledInputs(columns=columns):
            return (StoredTensor("columns", columns, per="node"),)
        case Zero() | LowRank() | Where() | Transpose() | Sum():
            return ()
    raise unknown("stored", w)


def shown_count(shown: Tensor, size: Sequence[int]) -> int:
    """Return the number of stored elements of a matrix `size`; `shown` may be one row, for all rows."""
    return int(torch.count_nonzero(shown.expand(size)))  # a sum over bool would first make a copy in int64


def both(shown: Tensor | None, selected: Tensor) -> Tensor:
    """Return the part of `shown` (None: everything) that is also selected."""
    return selected if shown is None else shown & selected


def unknown(question: str, node: object) -> TypeError:
    """Return the error of a recursion that meets a node it has no rule for."""
    return TypeError(f"{question} has no rule for {type(node).__name__}; every node needs one")
