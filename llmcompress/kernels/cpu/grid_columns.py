"""The kernel for CPUs that rounds the columns of a `GridBlock`, or prunes them, and feeds their errors on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from torch import Tensor

from llmcompress.kernels.column_block import GridBlock
from llmcompress.kernels.cpu.build import load_kernel
from llmcompress.kernels.cpu.calls import OWN, KernelFunction, address_of, launch, own_values
from llmcompress.kernels.cpu.emit import F32, I32, I64, Value, vector
from llmcompress.kernels.cpu.quantize_inputs import ROUNDING
from llmcompress.kernels.cpu.vectors import round_short

ROWS = 64  # of a thread, in a copy that fits its first cache
COST = 64  # weights that a weight of this kernel counts as in `launch`


class GridArgument(IntEnum):
    """The place of an argument; tensors are float32 unless they say otherwise."""

    CURRENT = OWN  # [columns, out]
    INVERSE = auto()  # [groups, out]
    MIDDLE = auto()
    SCALE = auto()
    GROUPS = auto()  # int32 [columns]
    SHARES = auto()  # [columns, columns]
    ERRORS = auto()  # [columns, out]
    ROUNDED = auto()
    COLUMNS = auto()
    OUT = auto()
    TOP = auto()  # the highest code
    ROOM = auto()  # [blocks, columns, ROWS]
    BEFORE = auto()  # [columns, out]


@dataclass(frozen=True)
class GridColumns:
    """The kernel; `feeds` and `again` as in `ColumnSearch`; `prunes`: a `GridBlock` without codes."""

    feeds: bool
    again: bool
    prunes: bool = False

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of blocks of rows."""
        sizes = {place: f.size(place) for place in GridArgument}
        with f.loop(f.first, f.last) as block:
            first = block * ROWS
            tile = f.behind(f.address(sizes[GridArgument.ROOM]), first * sizes[GridArgument.COLUMNS] * 4)
            left = sizes[GridArgument.OUT] - first
            count = left.least(f.constant(I64, ROWS))
            self._copy(f, sizes, tile, first, count, back=False)
            with f.loop(0, sizes[GridArgument.ROUNDED]) as column:
                self._round_column(f, sizes, tile, column, (first, count))
            self._copy(f, sizes, tile, first, count, back=True)

    def _copy(self, f: KernelFunction, sizes: Any, tile: Value, first: Value, count: Value, back: bool) -> None:
        """Write the rows of a block into the tile, or back."""
        current = f.address(sizes[GridArgument.CURRENT])
        with f.loop(0, sizes[GridArgument.COLUMNS]) as column, f.loop(0, count) as row:
            place, own = (column * sizes[GridArgument.OUT] + first + row) * 4, (column * ROWS + row) * 4
            if back:
                f.store(f.load(tile, F32, own), current, place)
            else:
                f.store(f.load(current, F32, place), tile, own)

    def _round_column(
        self, f: KernelFunction, sizes: Any, tile: Value, column: Value, rows: tuple[Value, Value]
    ) -> None:
        """Round a column of the tile; write its errors, and move the later columns of the tile."""
        first, count = rows
        group = f.load(f.address(sizes[GridArgument.GROUPS]), I32, column * 4).wider(I64)
        start = group * sizes[GridArgument.OUT] + first
        top = Value(f, f.builder.sitofp(sizes[GridArgument.TOP].raw, F32))

        def write(row: Value, lanes: int) -> None:
            kind = vector(F32, lanes)
            inverse, middle, scale = (
                f.load(f.address(sizes[place]), kind, (start + row) * 4)
                for place in (GridArgument.INVERSE, GridArgument.MIDDLE, GridArgument.SCALE)
            )
            own = (column * ROWS + row) * 4
            wanted = f.load(tile, kind, own)
            if self.prunes:
                stored = round_short(wanted) * scale
            else:
                code = wanted.fma(inverse, middle).larger(f.constant(kind, 0.0)).smaller(top.splat(lanes))
                stored = (code + ROUNDING - ROUNDING - middle) * scale
            f.store(stored, tile, own)
            if not self.feeds:
                return
            place = (column * sizes[GridArgument.OUT] + first + row) * 4
            before = f.address(sizes[GridArgument.BEFORE])
            error = stored - f.load(before, kind, place) if self.again else wanted - stored
            f.store(error, f.address(sizes[GridArgument.ERRORS]), place)
            shares = f.behind(f.address(sizes[GridArgument.SHARES]), column * sizes[GridArgument.COLUMNS] * 4)
            with f.loop(column + 1, sizes[GridArgument.COLUMNS]) as later:
                share = f.constant(F32, 0.0) - f.load(shares, F32, later * 4)
                spot = (later * ROWS + row) * 4
                f.store(error.fma(share.splat(lanes), f.load(tile, kind, spot)), tile, spot)

        f.each(count, write)


def round_columns(block: GridBlock, errors: Tensor) -> None:
    """Round the columns of a block; see `GridBlock`."""
    (columns, out), blocks = block.current.shape, -(-block.current.shape[1] // ROWS)
    room = block.current.new_empty(blocks * columns * ROWS)
    tensors = (block.current, *block.parameters, block.groups, block.shares, errors)
    sizes = len(block.groups), columns, out, block.levels - 1
    values = own_values([*map(address_of, tensors), *sizes, *map(address_of, (room, block.before))])
    kernel = GridColumns(block.shares is not None, block.before is not None, block.levels == 0)
    launch(load_kernel(kernel), values, blocks, out * columns * COST)
