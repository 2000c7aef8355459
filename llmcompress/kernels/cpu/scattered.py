"""Matrices of which few elements show: lists of columns and values by row, and the kernels that read them.

Rows are sorted by the length of their lists, so that the 16 of a tile go down theirs together with little to pad. A
step of a tile is 16 bytes, how far each row's next column lies behind its last one, and 16 values. The byte 0 stands
for no column, for rows whose list has ended; `JUMP` goes that many less one columns on and has no value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.kernels.cpu.arguments import Argument, address, read
from llmcompress.kernels.cpu.emit import F16, I8, I16, I32, I64, Function, Value, Variable, vector
from llmcompress.kernels.cpu.gather import FLOATS, LANES, gathered
from llmcompress.kernels.cpu.instruction_sets import Instructions, chosen, is_equal
from llmcompress.kernels.cpu.product import ADDRESS

JUMP = 255
HEAD = 3 * 4 * LANES  # bytes of a tile's scales, centres and rows
SIZES = {"codes": 1, "bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a value


@dataclass(frozen=True, eq=False)
class Lists:
    """The elements `[out, in]` that show of a matrix, 0 elsewhere: values are `(value - centre) * scale` of their row.

    `kind` is that of the values, one of `SIZES`; `codes` are uint8.
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

    @property
    def bytes(self) -> int:
        """Bytes that a product reads."""
        return self.steps.nbytes + self.heads.nbytes + self.starts.nbytes


def lists(values: Tensor, shown: Tensor, scale: Tensor | None = None, centre: Tensor | None = None) -> Lists:
    """Return the elements that show, `shown` bool `[out, in]`, of values with the scales and centres `[out]` of rows.

    Values are uint8, bfloat16, float16 or float32 `[out, in]`.
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
    held = np.zeros((starts[-1], (1 + size) * LANES), np.uint8)
    held[steps, lanes] = JUMP
    held[steps[last], lanes[last]] = far - (entries - 1) * (JUMP - 1)
    raw = values[shown].reshape(-1, 1).contiguous().view(torch.uint8).numpy()
    places = LANES + lanes[last, None] * size + np.arange(size)
    held[steps[last, None], places] = raw
    kind = "codes" if values.dtype == torch.uint8 else str(values.dtype).removeprefix("torch.")
    heads = _heads(order, tiles, scale, centre)
    return Lists((rows, width), kind, torch.from_numpy(held.reshape(-1)), heads, torch.from_numpy(starts))


def _heads(order: NDArray[np.int64], tiles: int, scale: Tensor | None, centre: Tensor | None) -> Tensor:
    """Return the scales, centres and rows of tiles; rows that pad lie behind the others."""
    rows = len(order)
    found = np.zeros((3, tiles * LANES), np.int32)
    found[0, :rows] = (np.ones(rows, np.float32) if scale is None else scale.float().numpy()[order]).view(np.int32)
    found[1, :rows] = (np.zeros(rows, np.float32) if centre is None else centre.float().numpy()[order]).view(np.int32)
    found[2] = np.arange(tiles * LANES)
    found[2, :rows] = order
    return torch.from_numpy(found.reshape(3, tiles, LANES).transpose(1, 0, 2).copy())


# --- kernels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListProduct:
    """`y = x @ W.T` for so many tokens of float32 inputs and values of a kind; `y` float32 `[tokens, rows]`."""

    kind: str
    tokens: int

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of tiles."""
        f = Function(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        before = f.behind(address(f, Argument.X), -4)  # columns are counted from 1
        with f.loop(f.arguments[1], f.arguments[2]) as tile:
            scale, centre, rows = _head(f, tile)
            totals = [f.variable(f.constant(FLOATS, 0.0)) for _ in range(self.tokens)]
            at = f.variable(f.constant(vector(I32, LANES), 0))
            with f.loop(*_steps(f, tile)) as step:
                column, value, none = _element(f, self.kind, step, at, centre)
                value = chosen(none, value, f.constant(FLOATS, 0.0))
                for token, total in enumerate(totals):
                    x = f.behind(before, read(f, Argument.COLUMNS) * (4 * token))
                    total.set(value.fma(gathered(target, f, x, column), total.get()))
            for token, total in enumerate(totals):
                start, found = read(f, Argument.ROWS) * token, total.get() * scale
                for lane in range(LANES):
                    f.store(found.at(lane), address(f, Argument.Y), (start + rows.at(lane).wider(I64)) * 4)
        f.finish()


@dataclass(frozen=True)
class ListDecoding:
    """The values in their columns, `y [16 * tiles, columns]` in the order of the tiles, float32 or bfloat16.

    Nothing else is written, but anything to the last column.
    """

    kind: str
    bfloat16: bool

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of tiles."""
        f = Function(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        columns, size = read(f, Argument.COLUMNS), 2 if self.bfloat16 else 4
        with f.loop(f.arguments[1], f.arguments[2]) as tile:
            scale, centre, _ = _head(f, tile)
            at = f.variable(f.constant(vector(I32, LANES), 0))
            y = f.behind(address(f, Argument.Y), tile * columns * (LANES * size))
            with f.loop(*_steps(f, tile)) as step:
                column, value, none = _element(f, self.kind, step, at, centre)
                found = (value * scale).to_bfloat16() if self.bfloat16 else value * scale
                places = chosen(none, column, columns.narrower(I32).splat(LANES)) - 1
                for lane in range(LANES):
                    place = columns * lane + places.at(lane).wider(I64)
                    f.store(found.at(lane), y, place * size)
        f.finish()


def _head(f: Function, tile: Value) -> tuple[Value, Value, Value]:
    """Write the scales, centres and rows of a tile."""
    place = f.behind(address(f, Argument.SCALES), tile * HEAD)
    kinds = (FLOATS, FLOATS, vector(I32, LANES))
    scale, centre, rows = (f.load(place, kind, 4 * LANES * number) for number, kind in enumerate(kinds))
    return scale, centre, rows


def _steps(f: Function, tile: Value) -> tuple[Value, Value]:
    """Write the first step of a tile and the end."""
    first, last = (f.load(address(f, Argument.ZEROS), I64, (tile + more) * 8) for more in (0, 1))
    return first, last


def _element(f: Function, kind: str, step: Value, at: Variable, centre: Value) -> tuple[Value, Value, Value]:
    """Write a step: columns, counted from 1, values less their centres, and what is not 0 where there is no element."""
    place = f.behind(address(f, Argument.CODES), step * (LANES * (1 + SIZES[kind])))
    far = f.load(place, vector(I8, LANES)).wider(I32, False)
    jumps = is_equal(far, JUMP)  # all ones, that is -1
    at.set(at.get() + far + jumps)
    first = f.constant(far.type, 1)
    column = f.call("llvm.smax", far.type, at.get(), first, overloads=(far.type,))
    return column, _values(f, kind, f.behind(place, LANES), centre), jumps | is_equal(far, 0)


def _values(f: Function, kind: str, place: Value, centre: Value) -> Value:
    """Write the values of a step, float32 `[16]`."""
    if kind == "codes":
        return f.load(place, vector(I8, LANES)).wider(I32, False).to_float() - centre
    if kind == "bfloat16":
        return (f.load(place, vector(I16, LANES)).wider(I32, False) << 16).as_type(FLOATS)
    found = f.load(place, FLOATS if kind == "float32" else vector(F16, LANES))
    return found if kind == "float32" else found.to_float()
