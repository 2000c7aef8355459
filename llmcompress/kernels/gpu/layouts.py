"""The run-time forms of compressed weights on a GPU: what a kernel reads, in the order in which it reads it.

The stored form is made to be small and the same everywhere; these are made so that neighbouring threads read
neighbouring bytes. They hold the same numbers. None of them is written to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""The widths, each a divisor of 32, of the words that hold codes of so many bits: the lowest bits lie in the first."""
WORD = 32  # bits


@dataclass(frozen=True, eq=False)
class Tensors:
    """A form that is made of tensors, numbers and forms."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the form and of those within it."""
        for field in fields(self):
            value = getattr(self, field.name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Tensor):
                    yield each
                elif isinstance(each, Tensors):
                    yield from each.tensors()

    def bytes(self) -> int:
        """Return the bytes that a product reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass(frozen=True, eq=False)
class InputChange(Tensors):
    """A change of inputs before a product: `hadamard(x * factors)` over `block` columns, as in `weight/hadamard.py`.

    `factors` float32 `[in]` include the factor that makes the transform orthonormal. A block of 1 only multiplies.
    """

    factors: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class GridRows(Tensors):
    """Codes of a grid, packed along the row: `(code - zero) * scale`.

    A group of `group` columns has `span` words of the widest plane, in each as many codes as fit. Code k of word w is
    that of column k * span + w of its group, so that threads with neighbouring words read neighbouring inputs. Narrower
    planes continue the same order: a word of theirs serves several words of the widest. Codes of columns that are not
    there are 0, and their inputs are taken as 0.

    `planes` int32 `[out, words]`; `scale` float16 `[out, groups]`; `zero` uint8 like it, None for the symmetric grid.
    """

    planes: tuple[Tensor, ...]
    scale: Tensor
    zero: Tensor | None
    size: tuple[int, int]
    bits: int
    levels: int
    group: int
    span: int


@dataclass(frozen=True, eq=False)
class SalientRows(Tensors):
    """Single weights that stand in the place of those of a grid, row by row.

    `starts` int32 `[out + 1]`: the numbers of each row's first weight and of the one after its last. `columns` int16 or
    int32 `[weights]`, or `[weights of a row]` where all rows have the same (`shared`). `numbers` `[weights]`: uint8
    codes of the symmetric grid with `levels` and `scale` float16 `[out, groups]`, or floats, for which `scale` is None.
    The grid's own code is 0 at these places, and the kernel takes back what it stands for.
    """

    starts: Tensor
    columns: Tensor
    numbers: Tensor
    scale: Tensor | None
    levels: int
    group: int
    shared: bool
    most: int  # weights of a row


@dataclass(frozen=True, eq=False)
class StreamRows(Tensors):
    """Streams of a trellis, in units of 32 steps of every column.

    A unit has `bits` words for each column, first code in the highest bits; a word in front of a stream has the state
    that the column before ended in. `words` int32 `[rows of words, in]`; `units` int32 `[units, 3]`: the row of words
    before a unit's first, its first row of the matrix, and how many rows are there. `scale` float32 `[out]`.

    `numbers` bfloat16 `[states, values]`, which holds those of both codes exactly.
    """

    words: Tensor
    units: Tensor
    scale: Tensor
    numbers: Tensor
    size: tuple[int, int]
    bits: int
    values: int
    memory: int


@dataclass(frozen=True, eq=False)
class LowRankRows(Tensors):
    """A low-rank term: `left[row] @ (right @ x)[start[row]:][:rank]`.

    `left` `[out, rank]` and `right` `[ranks, in]` in the dtype of the inputs; `starts` int32 `[out]`: where the part of
    a row's matrix begins, of several below each other. `inputs`: the number of the changes that `right` is given.
    """

    left: Tensor
    right: Tensor
    starts: Tensor
    inputs: int


@dataclass(frozen=True, eq=False)
class Branch(Tensors):
    """A packed matrix, with the number of the changes of its inputs."""

    inputs: int
    rows: GridRows | StreamRows
    salient: SalientRows | None = None


@dataclass(frozen=True, eq=False)
class GpuWeight(Tensors):
    """A compressed weight, or several below each other, as kernels multiply by it: the sum of its branches.

    `changes`: what is done to the inputs, one after the other, in each of the ways that branches name by number.
    `heights`: the rows of each of the matrices.
    """

    changes: tuple[tuple[InputChange, ...], ...]
    branches: tuple[Branch, ...]
    low_rank: LowRankRows | None
    heights: tuple[int, ...]
    width: int
