"""The run-time forms of compressed weights on a GPU, and the repacking of stored ones, by torch on their device.

The stored form is small and the same everywhere; in these forms neighbouring threads read neighbouring bytes. They hold
the same numbers, and none of them is written to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Columns, Dense, Grid, LowRank, TrellisCodes, Where, shape
from llmcompress.weight.packing import stream_bits
from llmcompress.weight.trellis import cuts, states, table

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes of codes of so many bits, each a divisor of 32; the first has the lowest bits."""
WORD = 32  # bits
NARROW = 1 << 15  # columns that int16 can number


@dataclass(frozen=True, eq=False)
class Tensors:
    """A form made of tensors, numbers and forms."""

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
    planes continue the same order: a word of theirs serves several words of the widest. Codes beyond the last column
    are 0, and their inputs count as 0.

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
    """Single weights that replace those of a grid, row by row.

    `starts` int32 `[out + 1]`: the numbers of each row's first weight and of the one after its last. `columns` int16 or
    int32 `[weights]`, or `[weights of a row]` where all rows have the same (`shared`). `numbers` `[weights]`: uint8
    codes of the symmetric grid with `levels` and `scale` float16 `[out, groups]`, or floats, for which `scale` is None.
    The grid's own code is 0 at these places, and the kernel subtracts its weight.
    """

    starts: Tensor
    columns: Tensor
    numbers: Tensor
    scale: Tensor | None
    levels: int
    group: int
    shared: bool


@dataclass(frozen=True, eq=False)
class StreamRows(Tensors):
    """Streams of a trellis, in units of 32 steps of every column.

    A unit has `bits` words for each column, first code in the highest bits; a word in front of a stream has the state
    in which it starts. `words` int32 `[rows of words, in]`; `units` int32 `[units, 3]`: the row of words
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
    """A low-rank term `left @ (right @ x)`.

    `left` `[out, rank]` and `right` `[rank, in]` in the dtype of the inputs. `inputs`: the number of the changes of
    inputs before `right`.
    """

    left: Tensor
    right: Tensor
    inputs: int


@dataclass(frozen=True, eq=False)
class Branch(Tensors):
    """A packed matrix, with the number of the changes of its inputs."""

    inputs: int
    rows: GridRows | StreamRows
    salient: SalientRows | None = None


@dataclass(frozen=True, eq=False)
class GpuWeight(Tensors):
    """A compressed weight for kernels: the sum of its branches, and a low-rank term.

    `changes`: sequences of changes of the inputs, which branches name by number.
    """

    changes: tuple[tuple[InputChange, ...], ...]
    branches: tuple[Branch, ...]
    low_rank: LowRankRows | None
    width: int


# --- grids ----------------------------------------------------------------------------------------------------------


def pack_grid(w: Grid) -> GridRows:
    """Repack a grid."""
    rows, width = shape(w)
    bits, group = stream_bits(w.levels), min(w.group_size, width)
    widths = PLANES[bits]
    fields = WORD // widths[0]
    share = widths[0] // widths[-1]
    span = -(-group // (fields * share)) * share
    groups = -(-width // group)
    codes = pad(w.codes, (0, groups * group - width)).reshape(rows, groups, group)
    codes = pad(codes, (0, fields * span - group)).reshape(rows, groups, fields, span)
    codes = codes.transpose(2, 3)  # [rows, groups, words, fields]
    planes, low = [], 0
    for plane in widths:
        planes.append(_words((codes >> low) & ((1 << plane) - 1), plane).reshape(rows, -1))
        low += plane
    scale = w.scale.expand(rows, -1).contiguous()
    zero = None if w.zero is None else w.zero.expand(rows, -1).contiguous()
    return GridRows(tuple(planes), scale, zero, (rows, width), bits, w.levels, group, span)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return codes `[..., words, fields]` as int32 `[..., own words]`, the first code in the lowest bits."""
    runs = codes.reshape(*codes.shape[:-2], -1, WORD // bits)
    words = torch.zeros(runs.shape[:-1], dtype=torch.int32, device=codes.device)
    for place in range(WORD // bits):
        words |= runs[..., place].int() << (bits * place)
    return words


def pack_salient(w: Where, dtype: torch.dtype) -> tuple[GridRows, SalientRows] | None:
    """Repack a grid with single weights in its place; None if kernels do not read their kinds."""
    if not isinstance(w.outside, Grid) or not isinstance(w.inside, Grid | Dense) or w.outside.codes.is_floating_point():
        return None
    size = shape(w)
    inside = w.index.inside.expand(size)
    background = pack_grid(replace(w.outside, codes=w.outside.codes.masked_fill(inside, 0)))
    starts = pad(inside.sum(1).cumsum(0), (1, 0)).int()
    shared = isinstance(w.index, Columns)
    columns = (w.index.inside if shared else inside).nonzero()[:, -1]
    columns = columns.to(torch.int16 if size[1] <= NARROW else torch.int32)
    coded = isinstance(w.inside, Grid) and w.inside.zero is None and not w.inside.codes.is_floating_point()
    if isinstance(w.inside, Grid) and coded:
        numbers, levels = w.inside.codes[inside], w.inside.levels
        scale, group = w.inside.scale.expand(size[0], -1).contiguous(), min(w.inside.group_size, size[1])
    else:
        numbers, scale, levels, group = dense(w.inside)[inside].to(dtype), None, 1, size[1]
    return background, SalientRows(starts, columns, numbers, scale, levels, group, shared)


# --- trellises ------------------------------------------------------------------------------------------------------


def pack_streams(w: TrellisCodes) -> StreamRows:
    """Repack the streams of a trellis."""
    (rows, width), trellis = shape(w), w.trellis
    words, units, above = [], [], 0
    for first, last in pairwise(cuts(rows, w.run, trellis)):
        codes = w.codes[first * width : last * width]
        ends = states(codes, width, trellis)[:, -1]
        before = ends if trellis.ring else pad(ends[:-1], (1, 0))
        own = _stream_words(codes.reshape(width, -1), trellis.bits)
        words += [before[None], own.T]
        for start in range(0, last - first, WORD):
            place = above + 1 + start // WORD * trellis.bits
            units.append((place, (first + start) * trellis.values, min(WORD, last - first - start) * trellis.values))
        above += 1 + own.shape[1]
    device = w.codes.device
    return StreamRows(
        torch.cat(words).contiguous(),
        torch.tensor(units, dtype=torch.int32, device=device),
        w.scale[:, 0].float(),
        table(trellis).to(device, torch.bfloat16),
        (rows, width),
        trellis.bits,
        trellis.values,
        trellis.memory,
    )


def _stream_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes `[columns, steps]` as int32 `[columns, words]`, the first in the highest bits, in whole units."""
    octets = pad(codes, (0, -codes.shape[1] % WORD)).reshape(len(codes), -1, 8).long()
    shifts = bits * torch.arange(7, -1, -1, device=codes.device)
    eight = (octets << shifts).sum(-1, keepdim=True)  # codes, which are `bits` bytes
    places = 8 * torch.arange(bits - 1, -1, -1, device=codes.device)
    bytes_of = ((eight >> places) & 255).reshape(len(codes), -1, 4)
    return (bytes_of << torch.tensor([24, 16, 8, 0], device=codes.device)).sum(-1).to(torch.int32)


# --- inputs and low rank --------------------------------------------------------------------------------------------


def add_change(changes: tuple[InputChange, ...], factors: Tensor, block: int) -> tuple[InputChange, ...]:
    """Return changes of inputs with one more; factors after factors are one change."""
    if changes and changes[-1].block == 1:
        return (*changes[:-1], InputChange(changes[-1].factors * factors, block))
    return (*changes, InputChange(factors, block))


def sign_factors(signs: Tensor, block: int) -> Tensor:
    """Return the factors of a rotation, float32 `[in]`."""
    return (signs.float() * 2 - 1) * block**-0.5


def pack_low_rank(w: LowRank, inputs: int, dtype: torch.dtype) -> LowRankRows:
    """Repack a low-rank term."""
    left, right = (dense(factor).to(dtype).contiguous() for factor in (w.left, w.right))
    return LowRankRows(left, right, inputs)
