"""The nodes of which a compressed weight is built: a small algebra, each node a matrix `[out, in]`.

Methods build expressions of them; `expression` says what one is worth, `encoding` how it lies on disk.

`Where` selects element by element, so both its sides have the full shape. Elements that a side does not show are not
stored: the selection (`shown`, true = stored) goes down to the leaves. Only a `Codebook` stores all its codes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmcompress.weight.trellis import Trellis


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


def both(shown: Tensor | None, selected: Tensor) -> Tensor:
    """What of `shown` (None: everything) is selected too."""
    return selected if shown is None else shown & selected


def turned(shown: Tensor | None, inner: Weight) -> Tensor | None:
    """What is shown of `Transposed(inner)`, as `inner` lies."""
    return None if shown is None else shown.expand(*reversed(shape(inner))).T


def unknown(question: str, node: object) -> TypeError:
    """The error of a recursion that meets a node it has no rule for."""
    return TypeError(f"{question} has no rule for {type(node).__name__}; every node needs one")
