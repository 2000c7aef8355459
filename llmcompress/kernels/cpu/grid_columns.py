"""The kernel that rounds a run of columns to grids and feeds their errors on, on CPUs: see `kernels/grid_block.py`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from llmcompress.kernels.cpu.arguments import Argument, address
from llmcompress.kernels.cpu.build import loaded
from llmcompress.kernels.cpu.emit import F32, I8, I32, I64, Function, Value, vector
from llmcompress.kernels.cpu.instruction_sets import Instructions
from llmcompress.kernels.cpu.launch import Values, launch
from llmcompress.kernels.cpu.quantize_inputs import ROUNDING
from llmcompress.kernels.grid_block import GridBlock

ROWS = 64  # that a thread takes through all columns, in a copy that fits its first cache
LANES = 16
COST = 64  # weights of a row that count as one of `launch`


class GridPlace(IntEnum):
    """The place of an argument; tensors are float32 unless they say otherwise."""

    CURRENT = 0  # [columns, out]
    INVERSE = 1  # [groups, out]
    MIDDLE = 2
    SCALE = 3
    GROUPS = 4  # int32 [columns]
    SHARES = 5  # [columns, columns]
    ERRORS = 6  # [columns, out]
    ROUNDED = 7
    COLUMNS = 8
    OUT = 9
    TOP = 10  # the highest code
    ROOM = 11  # [blocks, columns, ROWS]
    BEFORE = 12  # [columns, out]


Arguments = ctypes.c_int64 * len(GridPlace)


@dataclass(frozen=True)
class GridColumns:
    """The kernel. `feeds`: errors move later columns. `again`: an error is what a column moves by."""

    feeds: bool
    again: bool

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write `kernel(arguments, first block of rows, last block)`."""
        f = Function(module, "kernel", [I8.as_pointer(), I64, I64], target.tier.fused)
        given = address(f, Argument.TABLE)
        sizes = {place: f.load(given, I64, 8 * place) for place in GridPlace}
        with f.loop(f.arguments[1], f.arguments[2]) as block:
            first = block * ROWS
            tile = f.behind(f.address(sizes[GridPlace.ROOM]), first * sizes[GridPlace.COLUMNS] * 4)
            left = sizes[GridPlace.OUT] - first
            count = f.call("llvm.smin", I64, left, f.constant(I64, ROWS), overloads=(I64,))
            self._copy(f, sizes, tile, first, count, back=False)
            with f.loop(0, sizes[GridPlace.ROUNDED]) as column:
                self._column(f, sizes, tile, column, (first, count))
            self._copy(f, sizes, tile, first, count, back=True)
        f.finish()

    def _copy(self, f: Function, sizes: Any, tile: Value, first: Value, count: Value, back: bool) -> None:
        """Write the rows of a block into the tile, or back."""
        current = f.address(sizes[GridPlace.CURRENT])
        with f.loop(0, sizes[GridPlace.COLUMNS]) as column, f.loop(0, count) as row:
            place, own = (column * sizes[GridPlace.OUT] + first + row) * 4, (column * ROWS + row) * 4
            if back:
                f.store(f.load(tile, F32, own), current, place)
            else:
                f.store(f.load(current, F32, place), tile, own)

    def _column(self, f: Function, sizes: Any, tile: Value, column: Value, rows: tuple[Value, Value]) -> None:
        """Round a column of the tile; write its errors, and move the later columns of the tile."""
        first, count = rows
        group = f.load(f.address(sizes[GridPlace.GROUPS]), I32, column * 4).wider(I64)
        start = group * sizes[GridPlace.OUT] + first
        top = Value(f, f.builder.sitofp(sizes[GridPlace.TOP].raw, F32))

        def write(row: Value, lanes: int) -> None:
            kind = vector(F32, lanes)
            inverse, middle, scale = (
                f.load(f.address(sizes[place]), kind, (start + row) * 4)
                for place in (GridPlace.INVERSE, GridPlace.MIDDLE, GridPlace.SCALE)
            )
            own = (column * ROWS + row) * 4
            wanted = f.load(tile, kind, own)
            code = wanted.fma(inverse, middle).larger(f.constant(kind, 0.0)).smaller(top.splat(lanes))
            stored = (code + ROUNDING - ROUNDING - middle) * scale
            f.store(stored, tile, own)
            if not self.feeds:
                return
            place = (column * sizes[GridPlace.OUT] + first + row) * 4
            before = f.address(sizes[GridPlace.BEFORE])
            error = stored - f.load(before, kind, place) if self.again else wanted - stored
            f.store(error, f.address(sizes[GridPlace.ERRORS]), place)
            shares = f.behind(f.address(sizes[GridPlace.SHARES]), column * sizes[GridPlace.COLUMNS] * 4)
            with f.loop(column + 1, sizes[GridPlace.COLUMNS]) as later:
                share = f.constant(F32, 0.0) - f.load(shares, F32, later * 4)
                spot = (later * ROWS + row) * 4
                f.store(error.fma(share.splat(lanes), f.load(tile, kind, spot)), tile, spot)

        whole = count - (count & (LANES - 1))
        with f.loop(0, whole, LANES) as row:
            write(row, LANES)
        with f.loop(whole, count) as row:
            write(row, 1)


def round_columns(block: GridBlock, errors: Tensor) -> None:
    """Round the columns of a block; see `GridBlock`."""
    (columns, out), blocks = block.current.shape, -(-block.current.shape[1] // ROWS)
    room = torch.empty(blocks * columns * ROWS)
    tensors = (block.current, *block.parameters, block.groups, block.shares, errors)
    sizes = len(block.groups), columns, out, block.levels - 1
    given = Arguments(*map(_place, tensors), *sizes, *map(_place, (room, block.before)))
    values = Values()
    values[Argument.TABLE] = ctypes.addressof(given)
    kernel = GridColumns(block.shares is not None, block.before is not None)
    launch(loaded(kernel), values, blocks, out * columns * COST)


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
