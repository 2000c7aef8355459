"""Stored weights repacked for kernels, and the kernels of each form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.kernels.cpu.calls import Values
from llmcompress.kernels.cpu.emit import LANES
from llmcompress.kernels.cpu.formats import FloatCodes, Format, IntegerPlanes, Streams
from llmcompress.kernels.cpu.product import Decoding, Product, block_size, shares
from llmcompress.kernels.cpu.tables import (
    BookCodes,
    BookDecoding,
    BookProduct,
    TableDecoding,
    TableProduct,
    TableStreams,
)
from llmcompress.weight.expression import float_steps, float_values
from llmcompress.weight.nodes import Codebook, Grid, Minifloat, TrellisCodes, Weight, shape
from llmcompress.weight.trellis import cuts, linear_code

BEFORE = 2  # units before a block that windows may reach into
AT_ONCE = 2048  # rows repacked at a time, since bytes of single bits take many times the memory
SLACK = 64  # bytes that a kernel may read behind the last code
LONGEST_VECTOR = 16  # of a codebook: code for each of its numbers is compiled
FEWEST_NUMBERS = 64  # of a linear code: what a lookup takes
STEPS = {"e2m1": 2, "e2m3": 8}  # of floats that are multiples of a step: steps in 1
Bytes = NDArray[np.uint8]
Leaf = Grid | TrellisCodes | Codebook | Minifloat


@dataclass(frozen=True, eq=False)
class KernelMatrix:
    """A matrix `[out, in]` in the form of kernels; `rows` and `columns` are rounded up to whole blocks."""

    form: Format
    size: tuple[int, int]
    rows: int
    columns: int
    groups: int
    codes: Tensor  # uint8, flat
    scales: Tensor  # float16, or bfloat16 of floats of few bits: [row tiles, groups, 16]
    zeros: Tensor | None  # uint8, alike
    table: Tensor | None = None  # float32 [length, entries], of a codebook, whose columns of codes are vectors

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """The addresses of codes, scales and zero points; 0 for none."""
        zeros = 0 if self.zeros is None else self.zeros.data_ptr()
        return self.codes.data_ptr(), self.scales.data_ptr(), zeros

    @cached_property
    def table_address(self) -> int:
        """The address of the table; 0 for none."""
        return 0 if self.table is None else self.table.data_ptr()

    @property
    def decoded_columns(self) -> int:
        """Columns of the matrix, rounded up alike."""
        return self.columns if self.table is None else self.columns * len(self.table)

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of a block of rows."""
        return (self.codes.numel() - SLACK) // (self.rows // self.form.block_rows)

    @property
    def takes_floats(self) -> bool:
        """True if the weights are floats, so that products take inputs as they are."""
        return isinstance(self.form, TableStreams | BookCodes)

    @property
    def input_block(self) -> int:
        """Columns of a block of inputs."""
        return self.form.input_block if isinstance(self.form, BookCodes) else block_size(self.form)

    def product(self, tokens: int, numbers: int, bfloat16: bool) -> Product | TableProduct | BookProduct:
        """Return the kernel that multiplies by the matrix."""
        match self.form:
            case TableStreams() as form:
                return TableProduct(form, tokens, bfloat16)
            case BookCodes() as form:
                return BookProduct(form, tokens, bfloat16)
            case form:
                return Product(form, tokens, numbers, bfloat16)

    def product_values(self, inputs: tuple[int, ...], y: int) -> Any:
        """Return the arguments of a product; `inputs`: the addresses of codes, scales and sums."""
        return Values(*self.addresses, *inputs, y, self.columns, self.rows, self.groups, self.table_address)

    def decoding(self, bfloat16: bool) -> Decoding | TableDecoding | BookDecoding:
        """Return the kernel that decodes the matrix."""
        match self.form:
            case TableStreams() as form:
                return TableDecoding(form, bfloat16)
            case BookCodes() as form:
                return BookDecoding(form, bfloat16)
            case form:
                return Decoding(form, bfloat16)


def form_of(w: Leaf) -> IntegerPlanes | Streams | None:
    """Return the run-time form of a leaf; None if no kernel has its sizes or formats."""
    if not isinstance(w, Minifloat) and w.scale.dtype != torch.float16:
        return None  # kernels would take the bits for float16
    match w:
        case Grid():
            group, bits = _group(w), max(1, (w.levels - 1).bit_length())
            return None if group % 32 else IntegerPlanes(bits, group, w.zero is not None, (w.levels - 1) / 2)
        case Codebook(centroids=centroids):
            entries, length = centroids.shape
            if length > LONGEST_VECTOR:
                return None
            return BookCodes(max(1, (entries - 1).bit_length()), 0, False, 0.0, length=length)
        case Minifloat():
            return _float_form(w)
        case TrellisCodes(trellis=trellis):
            if trellis.code == "table":
                form: Streams = TableStreams.of(trellis)
            else:
                code = linear_code(trellis.bits, trellis.values, trellis.memory)
                if len(code.numbers[0]) < FEWEST_NUMBERS:
                    return None
                numbers = tuple(tuple(part.tolist()) for part in code.numbers)
                form = Streams(trellis.bits, trellis.values, trellis.memory, code.masks, numbers)
            return form if w.run % form.block_rows == 0 or w.run >= shape(w)[0] else None


def _float_form(w: Minifloat) -> FloatCodes | None:
    """Return the form of floats that are small integers; None with a scale of the tensor, too fine for bfloat16."""
    group, steps = _group(w), STEPS.get(w.form)
    if steps is None or group % 32 or w.tensor_scale is not None:
        return None
    whole = (float_values(w.form) * steps).to(torch.int64)
    centre = int(whole.max())
    table = tuple((whole + centre).tolist())
    return FloatCodes(len(table).bit_length() - 1, group, False, centre, 1 / steps, table=table)


def _group(w: Grid | Minifloat) -> int:
    """Return the columns of a scale, 0 for all."""
    return 0 if w.group_size >= w.codes.shape[1] else w.group_size


def pack_matrix(w: Weight) -> KernelMatrix | None:
    """Return a matrix repacked; None if no kernel reads its form."""
    form = form_of(w) if isinstance(w, Leaf) else None
    match w, form:
        case Grid(), IntegerPlanes():
            return _pack_grid(w, form)
        case Codebook(), BookCodes():
            return _pack_book(w, form)
        case Minifloat(codes), FloatCodes():
            return _pack_grid(Grid(codes, float_steps(w).bfloat16(), None, len(form.table), w.group_size), form)
        case TrellisCodes(), Streams():
            return _pack_streams(w, form)
    return None


def pack_elements(w: Grid, shown: Tensor) -> KernelMatrix | None:
    """Return a grid repacked with 0 outside of the mask `shown`, bool `[out, in]`; None if no integer can mean 0.

    The zero point means 0, or the middle of an odd number of levels. An even number of levels is doubled, in one bit
    more, to have a middle.
    """
    form, rows, width = form_of(w), *w.codes.shape
    if not isinstance(form, IntegerPlanes):
        return None
    if w.zero is not None:
        zero = w.zero if w.zero.shape[1] == 1 else w.zero.repeat_interleave(w.group_size, 1)[:, :width]
        return _pack_grid(replace(w, codes=torch.where(shown, w.codes, zero.expand(rows, width))), form)
    middle = w.levels // 2
    if w.levels % 2:
        return _pack_grid(replace(w, codes=w.codes.masked_fill(~shown, middle)), form)
    if form.wide:
        return None
    doubled = (2 * w.codes.to(torch.int16)).masked_fill(~shown, w.levels - 1).to(torch.uint8)
    return _pack_grid(replace(w, codes=doubled), replace(form, bits=form.bits + 1, centre=w.levels - 1.0, unit=0.5))


def _pack_grid(w: Grid, form: IntegerPlanes) -> KernelMatrix:
    rows, width = w.codes.shape
    block = form.step if isinstance(form, BookCodes) else block_size(form)
    padded_rows, columns = _round_up(rows, LANES), _round_up(width, block)
    packed = np.zeros(padded_rows * columns * form.bits // 8 + SLACK, np.uint8)
    for first in range(0, padded_rows, AT_ONCE):
        last = min(first + AT_ONCE, padded_rows)
        codes = np.zeros((last - first, columns), np.uint8)
        codes[: rows - first, :width] = w.codes[first:last].numpy()
        places = slice(first * columns * form.bits // 8, last * columns * form.bits // 8)
        packed[places] = _pack_planes(codes, form).reshape(-1)
    groups = w.scale.shape[1]
    scales = _by_tile(form, w.scale.expand(rows, groups), padded_rows)
    zeros = None if w.zero is None else _by_tile(form, w.zero.expand(rows, groups), padded_rows)
    return KernelMatrix(form, (rows, width), padded_rows, columns, groups, torch.from_numpy(packed), scales, zeros)


def _pack_book(w: Codebook, form: BookCodes) -> KernelMatrix:
    rows, vectors = w.codes.shape
    codes = _pack_grid(Grid(w.codes, w.scale, None, len(w.centroids), vectors), form)
    table = w.centroids.new_zeros(form.length, form.entries, dtype=torch.float32)
    table[:, : len(w.centroids)] = w.centroids.T
    return replace(codes, size=(rows, w.width), table=table)


def _pack_planes(codes: Bytes, form: IntegerPlanes) -> Bytes:
    """Return codes `[rows, columns]` as `IntegerPlanes` describes them."""
    tiles, spans = codes.shape[0] // LANES, codes.shape[1] // 32
    planes, left = [], form.bits
    for width in form.planes:
        left -= width
        part = (codes >> left) & ((1 << width) - 1)
        ordered = part.reshape(tiles, LANES, spans, width, 8 // width, 4).transpose(0, 2, 3, 1, 5, 4)
        bytes_of = [ordered[..., place] << (width * place) for place in range(8 // width)]
        planes.append(reduce(np.bitwise_or, bytes_of).reshape(tiles, spans, width, 64))
    return np.concatenate(planes, 2)


def _pack_streams(w: TrellisCodes, form: Streams) -> KernelMatrix:
    (rows, width), trellis = shape(w), w.trellis
    padded_rows, columns = _round_up(rows, form.block_rows), _round_up(width, block_size(form))
    block = columns // form.columns, form.plane_starts[-1]
    packed = np.zeros(padded_rows // form.block_rows * prod(block) + SLACK, np.uint8)
    blocks = iter(packed[:-SLACK].reshape(-1, *block))
    for first, last in pairwise(cuts(rows, w.run, trellis)):
        stream, steps = w.codes[first * width : last * width].numpy(), last - first
        pack = _units_of_rings if trellis.ring else _units_by_column
        units = pack(stream, steps, columns, form)
        for start in range(0, units.shape[1] - BEFORE, form.units):
            next(blocks)[:] = _pack_block(units[:, start : start + BEFORE + form.units], form)
    scales = _by_tile(form, w.scale, padded_rows)
    return KernelMatrix(form, (rows, width), padded_rows, columns, 1, torch.from_numpy(packed), scales, None)


def _units_by_column(stream: Bytes, steps: int, columns: int, form: Streams) -> Bytes:
    """Return the bytes of a stream by column and unit, `[columns, units, unit_bytes]`, behind `BEFORE` units before.

    A column is filled up to whole blocks with codes of the next one, which stand for no rows.
    """
    length = _round_up(steps, form.units * form.phases)
    if steps % form.phases:  # columns begin within a byte
        places = np.arange(columns)[:, None] * steps + np.arange(-BEFORE * form.phases, length)
        return _pack_units(stream[places.clip(0, len(stream) - 1)] * (places >= 0), form)
    behind = np.zeros(columns * steps + length - len(stream), np.uint8)
    flat = _pack_units(np.concatenate([np.zeros(BEFORE * form.phases, np.uint8), stream, behind])[None], form)[0]
    size = (columns, BEFORE + length // form.phases, form.unit_bytes)
    unit = flat.strides[0]
    return np.lib.stride_tricks.as_strided(flat, size, (steps // form.phases * unit, unit, 1))


def _units_of_rings(stream: Bytes, steps: int, columns: int, form: Streams) -> Bytes:
    """Do as `_units_by_column` for rings, which are filled up with their own codes."""
    places = np.arange(-BEFORE * form.phases, _round_up(steps, form.units * form.phases)) % steps
    rings = np.zeros((columns, steps), np.uint8)
    rings.reshape(-1)[: len(stream)] = stream
    return _pack_units(rings[:, places], form)


def _pack_units(codes: Bytes, form: Streams) -> Bytes:
    """Return codes `[..., n]` as bytes of units `[..., n / phases, unit_bytes]`, the first code in the highest bits."""
    units = codes.reshape(*codes.shape[:-1], -1, form.phases)
    word = np.zeros(units.shape[:-1], np.uint64)
    for phase in range(form.phases):
        word = word << np.uint64(form.bits) | units[..., phase]
    return word[..., None].byteswap().view(np.uint8)[..., 8 - form.unit_bytes :]


def _pack_block(units: Bytes, form: Streams) -> Bytes:
    """Return a block as `Streams` describes it, `[columns / form.columns, bytes]`."""
    together = units.reshape(-1, form.columns, BEFORE + form.units, form.unit_bytes)
    planes = [
        together[:, :, BEFORE - form.history(plane) :, plane].transpose(0, 2, 1).reshape(len(together), -1)
        for plane in range(form.unit_bytes)
    ]
    return np.concatenate(planes, 1)


def _by_tile(form: Format, values: Tensor, rows: int) -> Tensor:
    """Return numbers `[out, groups]` by the lanes of tiles: `[tiles, groups, 16]`, 0 for rows that do not exist."""
    full = values.new_zeros(rows, values.shape[1])
    full[: len(values)] = values
    ordered = full.reshape(-1, form.block_rows, values.shape[1])[:, form.order]
    lanes = ordered.repeat_interleave(shares(form), 1).reshape(-1, LANES, values.shape[1])
    return lanes.transpose(1, 2).contiguous()


def _round_up(count: int, size: int) -> int:
    return -(-count // size) * size
