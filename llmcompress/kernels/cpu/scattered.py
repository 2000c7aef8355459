"""Matrices with few elements: lists of columns and values by row, and the kernels that read them.

Rows are sorted by the length of their lists, so that the 16 of a tile need little padding. A step of a tile is 16
bytes, the distance of each row's next column from its last one, and 16 values. The byte 0 means no column, for rows
whose list has ended; `JUMP` goes JUMP - 1 columns on and has no value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.kernels.cpu.calls import Argument, KernelFunction
from llmcompress.kernels.cpu.emit import F16, FLOATS, I8, I16, I32, I64, INTEGERS, LANES, Value, Variable, vector
from llmcompress.kernels.cpu.instruction_sets import is_equal, select

JUMP = 255
HEAD = 3 * 4 * LANES  # bytes of a tile's scales, centres and rows
SIZES = {"codes": 1, "bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a value


@dataclass(frozen=True, eq=False)
class ElementLists:
    """The few elements of a matrix `[out, in]`, `(value - centre) * scale` with those of their row; 0 elsewhere.

    `kind`: the kind of the values, one of `SIZES`; `codes` are uint8.
    """

    size: tuple[int, int]
    kind: str
    steps: Tensor  # uint8, flat: 16 distances and 16 values a step
    heads: Tensor  # int32 [tiles, 3, 16]: the bits of the scales and of the centres, float32, and the rows
    starts: Tensor  # int64 [tiles + 1]: the first step of each tile

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return len(self.heads)


def list_elements(
    values: Tensor, shown: Tensor, scale: Tensor | None = None, centre: Tensor | None = None
) -> ElementLists:
    """Return the lists of the elements in the mask `shown`, bool `[out, in]`.

    `values` uint8, bfloat16, float16 or float32 `[out, in]`; `scale`, `centre` `[out]`: those of the rows.
    """
    rows, width = shown.shape
    row, column = (part.numpy() for part in shown.nonzero(as_tuple=True))
    far = np.diff(column, prepend=-1)
    far[np.diff(row, prepend=-1) != 0] = column[np.diff(row, prepend=-1) != 0] + 1
    entries = (far - 1) // (JUMP - 1) + 1  # jumps, and the element
    counts = np.bincount(row, entries, minlength=rows).astype(np.int64)
    order = np.argsort(-counts, kind="stable")
    tiles = -(-rows // LANES)
    full = np.full(tiles * LANES, 0, np.int64)
    full[:rows] = counts[order]
    starts = np.concatenate([[0], np.cumsum(full.reshape(tiles, LANES).max(1))])
    rank = np.empty(rows, np.int64)
    rank[order] = np.arange(rows)
    before = np.cumsum(counts) - counts  # entries of the rows before
    slots = np.arange(entries.sum()) - np.repeat(before[row], entries)
    ranks = np.repeat(rank[row], entries)
    steps, lanes = starts[ranks // LANES] + slots, ranks % LANES
    last = np.cumsum(entries) - 1
    size = values.element_size()
    packed = np.zeros((starts[-1], (1 + size) * LANES), np.uint8)
    packed[steps, lanes] = JUMP
    packed[steps[last], lanes[last]] = far - (entries - 1) * (JUMP - 1)
    raw = values[shown].reshape(-1, 1).contiguous().view(torch.uint8).numpy()
    places = LANES + lanes[last, None] * size + np.arange(size)
    packed[steps[last, None], places] = raw
    kind = "codes" if values.dtype == torch.uint8 else str(values.dtype).removeprefix("torch.")
    heads = _heads(order, tiles, scale, centre)
    return ElementLists((rows, width), kind, torch.from_numpy(packed.reshape(-1)), heads, torch.from_numpy(starts))


def _heads(order: NDArray[np.int64], tiles: int, scale: Tensor | None, centre: Tensor | None) -> Tensor:
    """Return the scales, centres and rows of tiles; rows that pad lie behind the others."""
    rows = len(order)
    heads = np.zeros((3, tiles * LANES), np.int32)
    heads[0, :rows] = (np.ones(rows, np.float32) if scale is None else scale.float().numpy()[order]).view(np.int32)
    heads[1, :rows] = (np.zeros(rows, np.float32) if centre is None else centre.float().numpy()[order]).view(np.int32)
    heads[2] = np.arange(tiles * LANES)
    heads[2, :rows] = order
    return torch.from_numpy(heads.reshape(3, tiles, LANES).transpose(1, 0, 2).copy())


# --- kernels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListProduct:
    """`y = x @ W.T` for so many tokens of float32 inputs and values of a kind; `y` float32 `[tokens, rows]`."""

    kind: str
    tokens: int

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of tiles."""
        before = f.behind(f.pointer(Argument.X), -4)  # columns are counted from 1
        with f.loop(f.first, f.last) as tile:
            scale, centre, rows = _head(f, tile)
            totals = [f.variable(f.constant(FLOATS, 0.0)) for _ in range(self.tokens)]
            at = f.variable(f.constant(INTEGERS, 0))
            with f.loop(*_steps(f, tile)) as step:
                column, value, none = _element(f, self.kind, step, at, centre)
                value = select(none, value, f.constant(FLOATS, 0.0))
                for token, total in enumerate(totals):
                    x = f.behind(before, f.size(Argument.COLUMNS) * (4 * token))
                    total.set(value.fma(f.target.gather(x, column), total.get()))
            for token, total in enumerate(totals):
                start, sums = f.size(Argument.ROWS) * token, total.get() * scale
                for lane in range(LANES):
                    f.store(sums.at(lane), f.pointer(Argument.Y), (start + rows.at(lane).wider(I64)) * 4)


@dataclass(frozen=True)
class ListDecoding:
    """The values in their columns, `y [16 * tiles, columns]` in the order of the tiles, float32 or bfloat16.

    Nothing else is written, but anything to the last column.
    """

    kind: str
    bfloat16: bool

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of tiles."""
        columns, size = f.size(Argument.COLUMNS), 2 if self.bfloat16 else 4
        with f.loop(f.first, f.last) as tile:
            scale, centre, _ = _head(f, tile)
            at = f.variable(f.constant(INTEGERS, 0))
            y = f.behind(f.pointer(Argument.Y), tile * columns * (LANES * size))
            with f.loop(*_steps(f, tile)) as step:
                column, value, none = _element(f, self.kind, step, at, centre)
                weights = (value * scale).to_bfloat16() if self.bfloat16 else value * scale
                places = select(none, column, columns.narrower(I32).splat(LANES)) - 1
                for lane in range(LANES):
                    place = columns * lane + places.at(lane).wider(I64)
                    f.store(weights.at(lane), y, place * size)


def _head(f: KernelFunction, tile: Value) -> tuple[Value, Value, Value]:
    """Write the scales, centres and rows of a tile."""
    place = f.behind(f.pointer(Argument.SCALES), tile * HEAD)
    kinds = (FLOATS, FLOATS, INTEGERS)
    scale, centre, rows = (f.load(place, kind, 4 * LANES * number) for number, kind in enumerate(kinds))
    return scale, centre, rows


def _steps(f: KernelFunction, tile: Value) -> tuple[Value, Value]:
    """Write the first step of a tile and the end."""
    first, last = (f.load(f.pointer(Argument.ZEROS), I64, (tile + more) * 8) for more in (0, 1))
    return first, last


def _element(f: KernelFunction, kind: str, step: Value, at: Variable, centre: Value) -> tuple[Value, Value, Value]:
    """Write a step: columns, counted from 1, values less their centres, and flags, not 0 where there is no element."""
    place = f.behind(f.pointer(Argument.CODES), step * (LANES * (1 + SIZES[kind])))
    far = f.load(place, vector(I8, LANES)).wider(I32, False)
    jumps = is_equal(far, JUMP)  # all ones, that is -1
    at.set(at.get() + far + jumps)
    first = f.constant(far.type, 1)
    column = f.call("llvm.smax", far.type, at.get(), first, overloads=(far.type,))
    return column, _values(f, kind, f.behind(place, LANES), centre), jumps | is_equal(far, 0)


def _values(f: KernelFunction, kind: str, place: Value, centre: Value) -> Value:
    """Write the values of a step, float32 `[16]`."""
    if kind == "codes":
        return f.load(place, vector(I8, LANES)).wider(I32, False).to_float() - centre
    if kind == "bfloat16":
        return (f.load(place, vector(I16, LANES)).wider(I32, False) << 16).as_type(FLOATS)
    if kind == "float32":
        return f.load(place, FLOATS)
    return f.load(place, vector(F16, LANES)).to_float()
