"""The run-time forms of weights that kernels read: the layout of codes, and their decoding to tiles of integers.

A `Format` describes blocks of `block_rows` rows. `tiles` writes the code that reads `step` columns of a block: uint8
vectors of 64, the `columns` (4, 8 or 16) of a row beside each other, by row tile and then from left to right; `order`
is the row of the block for each row of its tiles. A weight is `(integer - centre) * unit * scale`, where `group`
columns (a multiple of 32; 0: all) share a scale. With `zeros`, a group's zero point takes the place of the centre.
Integers of `wide` forms go beyond 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from llmcompress.kernels.cpu.calls import Argument, KernelFunction
from llmcompress.kernels.cpu.emit import I8, I16, Value, vector
from llmcompress.weight.trellis import UNIT

BYTES = vector(I8, 64)
AHEAD = 2048  # bytes ahead at which codes are prefetched


@dataclass(frozen=True)
class IntegerPlanes:
    """Integers of 1 to 8 bits: 16 rows of 32 columns are `64 * bits` bytes, in planes of 8, 4, 2 and 1 bits.

    A plane of p bits has p vectors of 64 bytes. Byte j of the four that belong to a row holds, in its bits from p * k
    on, column 4 (v * 8 / p + k) + j of the 32, with v the number of the vector. Higher bits are in wider planes.
    """

    bits: int
    group: int
    zeros: bool
    centre: float
    unit: float = 1.0
    block_rows: int = 16
    columns: int = 4
    step: int = 32

    @property
    def wide(self) -> bool:
        """True if integers go beyond 127."""
        return self.bits == 8

    @property
    def order(self) -> list[int]:
        """The row of the block for each row of its tiles."""
        return list(range(16))

    @property
    def planes(self) -> list[int]:
        """The widths of the planes, the widest first."""
        return [width for width in (8, 4, 2, 1) if self.bits & width]

    def tiles(self, f: KernelFunction, block: Value, column: Value) -> list[list[Value]]:
        """Write the tiles of a block of rows from a column on, `[row tile][columns]`."""
        start = block * f.size(Argument.COLUMNS) + column  # in units of 16 rows of one column, 2 * bits bytes
        place = f.behind(f.pointer(Argument.CODES), start * (2 * self.bits))
        quads: list[Value | None] = [None] * 8
        left = self.bits
        for width in self.planes:
            left -= width
            for at in range(width):
                packed = f.load(place, BYTES)
                f.prefetch(place, AHEAD)
                place = f.behind(place, 64)
                for k in range(8 // width):
                    part = (packed.as_type(vector(I16, 32)) >> (width * k)).as_type(BYTES) if k else packed
                    part = part & ((1 << width) - 1) if width < 8 else part
                    part = (part.as_type(vector(I16, 32)) << left).as_type(BYTES) if left else part
                    quad = at * 8 // width + k
                    before = quads[quad]
                    quads[quad] = part if before is None else before | part
        return [[quad for quad in quads if quad is not None]]


@dataclass(frozen=True)
class FloatCodes(IntegerPlanes):
    """Codes of floats of few bits in the layout of integers; the `table` of 16 or 64 codes holds integers below 128.

    Scales are bfloat16, which reaches as far as float32.
    """

    table: tuple[int, ...] = ()

    def tiles(self, f: KernelFunction, block: Value, column: Value) -> list[list[Value]]:
        """Write the tiles of a block of rows from a column on, `[row tile][columns]`."""
        [codes] = super().tiles(f, block, column)
        table = f.constant(vector(I8, len(self.table)), self.table)
        if len(self.table) == 16:
            return [[f.target.lookup16(table, places) for places in codes]]
        return [[f.target.lookup([table], places) for places in codes]]


@dataclass(frozen=True)
class Streams:
    """Streams of a trellis with a linear code, in blocks of up to 64 rows.

    A unit is the fewest codes that fill whole bytes: `phases` codes in `unit_bytes` bytes, the first code in the
    highest bits. `units` of a column are a block. Byte j of all units of `columns` columns lies together, by unit, then
    by column, behind those of the earlier units that windows reach into. So the same bits of all windows are loaded at
    once, and sums of bits need no shuffle; a tile is one phase and one value of its step.

    `masks` and `numbers` are those of `weight.trellis`, tables of whole vectors of 64 int8.
    """

    bits: int
    values: int
    memory: int
    masks: tuple[tuple[int, ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    group: int = 0
    zeros: bool = False
    wide: bool = True
    centre: float = 128.0  # numbers are stored that much higher
    unit: float = UNIT

    @property
    def phases(self) -> int:
        """Codes of a unit."""
        return 8 // gcd(8, self.bits)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.bits // gcd(8, self.bits)

    @property
    def units(self) -> int:
        """Units of a column in a block."""
        return min(16, 64 // (self.phases * self.values))

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return 64 // self.units

    @property
    def step(self) -> int:
        """Columns read at once."""
        return self.columns

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return self.units * self.phases * self.values

    @property
    def order(self) -> list[int]:
        """The row of the block for each row of its tiles."""
        tiles = [(phase, value) for phase in range(self.phases) for value in range(self.values)]
        return [
            (unit * self.phases + phase) * self.values + value for phase, value in tiles for unit in range(self.units)
        ]

    def window(self, phase: int) -> range:
        """Return the bytes of the state after a code, counted from the first byte of its unit."""
        end = (phase + 1) * self.bits
        return range((end - self.memory) // 8, -(-end // 8))

    def history(self, plane: int) -> int:
        """Return the number of units before a block whose byte `plane` the block needs."""
        reached = {at for phase in range(self.phases) for at in self.window(phase)}
        return max(-(at // self.unit_bytes) for at in reached | {plane} if at % self.unit_bytes == plane)

    @property
    def plane_starts(self) -> list[int]:
        """The first byte of each plane, and the end."""
        sizes = [(self.history(plane) + self.units) * self.columns for plane in range(self.unit_bytes)]
        return list(accumulate(sizes, initial=0))

    def offset(self, at: int) -> int:
        """Return the place of byte `at` of all units, counted from the first byte of a unit, in a block."""
        shift, plane = divmod(at, self.unit_bytes)
        return self.plane_starts[plane] + (self.history(plane) + shift) * self.columns

    def tiles(self, f: KernelFunction, block: Value, column: Value) -> list[list[Value]]:
        """Write the tiles of a block of rows from a column on, `[row tile][columns]`."""
        steps = (block * f.size(Argument.COLUMNS) + column) // self.columns
        place = f.behind(f.pointer(Argument.CODES), steps * self.plane_starts[-1])
        tables = [
            [f.constant(BYTES, [number + 128 for number in numbers[at : at + 64]]) for at in range(0, len(numbers), 64)]
            for numbers in self.numbers
        ]
        for line in range(0, self.plane_starts[-1], 64):
            f.prefetch(place, AHEAD + line)
        loaded: dict[int, Value] = {}
        tiles = []
        for phase in range(self.phases):
            for at in self.window(phase):
                if at not in loaded:
                    loaded[at] = f.load(place, BYTES, self.offset(at))
            for masks, table in zip(self.masks, tables):
                parts = [(loaded[at], self._bit_masks(phase, at, masks)) for at in self.window(phase)]
                tiles.append([f.target.lookup(table, f.target.sums_of_bits(parts))])
        return tiles

    def _bit_masks(self, phase: int, at: int, masks: tuple[int, ...]) -> list[int]:
        """Return the bits of byte `at` that each bit of the index sums, after the code `phase`."""
        last = 8 * at + 7 - (phase + 1) * self.bits + 1  # distance of the byte's lowest bit from the newest
        return [(mask << last if last >= 0 else mask >> -last) & 255 for mask in masks]


Format = IntegerPlanes | Streams
