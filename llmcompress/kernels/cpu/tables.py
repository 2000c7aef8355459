"""Kernels of weights that are looked up as floats: codebooks, and trellises with a table.

Codebooks: the codes number vectors of columns. A product first multiplies a token by all entries, in a table for each
vector of the inputs, and then adds one number of that table for each code, instead of a product for each weight. The
tables of a few vectors at a time stay in the first cache while many rows look numbers up. Entries are an argument, so
layers whose codebooks have one size share a kernel.

Trellises with a table: a float32 for each state. Thousands of numbers fit no register, so products read their inputs as
they are, and are as fast as gathering is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from llvmlite import ir

from llmcompress.kernels.cpu.calls import Argument, KernelFunction
from llmcompress.kernels.cpu.emit import ADDRESS, F32, FLOATS, I8, I32, INTEGERS, LANES, Value, vector
from llmcompress.kernels.cpu.formats import IntegerPlanes, Streams
from llmcompress.kernels.cpu.instruction_sets import join
from llmcompress.kernels.cpu.product import places_of_rows, scales_of, shares, store_sums, tiles_of
from llmcompress.weight.trellis import Trellis, table

FLOAT = 4  # bytes
TABLES = 1 << 15  # bytes of the tables of vectors at a time; the vectors that are read at once may have more
TILES = 128  # of rows, whose sums wait in the stack while the tables change
NOTHING = -0.0  # the initial sums; LLVM would turn 0.0 into a call of memset, and kernels call nothing
QUARTERS = 4  # vectors of a tile of a trellis


# --- codebooks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BookCodes(IntegerPlanes):
    """Codes of vectors of `length` columns in the layout of integers, one column of these for a vector."""

    length: int = 1

    @property
    def entries(self) -> int:
        """Entries of a table, in whole vectors of the kernel: those that have no code are 0."""
        return max(LANES, 1 << self.bits)

    @property
    def input_block(self) -> int:
        """Columns of the inputs for the codes that are read at once."""
        return self.step * self.length


@dataclass(frozen=True)
class BookProduct:
    """`y += x @ W.T` for so many tokens of float32 inputs; with `bfloat16`, `y` is that, and set."""

    form: BookCodes
    tokens: int
    bfloat16: bool = False

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of row blocks."""
        columns, first, last = f.size(Argument.COLUMNS), f.first, f.last
        tables = f.room(FLOATS, self._vectors * self.form.entries // LANES * self.tokens)
        sums = f.room(FLOATS, TILES * self.tokens)
        with f.loop(first, last, TILES) as start:
            stop = (start + TILES).least(last)
            with f.loop(0, TILES * self.tokens) as place:
                f.store(f.constant(FLOATS, NOTHING), sums, place * (LANES * FLOAT))
            with f.loop(0, columns, self._vectors) as column:
                until = (column + self._vectors).least(columns)
                self._multiply(f, tables, column, until)
                with f.loop(start, stop) as rows:
                    totals = f.behind(sums, (rows - start) * (LANES * FLOAT))
                    self._look_up(f, rows, (column, until), tables, totals)
            with f.loop(start, stop) as rows:
                self._store(f, rows, f.behind(sums, (rows - start) * (LANES * FLOAT)))

    @property
    def _vectors(self) -> int:
        """Vectors whose tables are held at once."""
        step = self.form.step
        return max(step, TABLES // (FLOAT * self.form.entries * self.tokens) // step * step)

    def _multiply(self, f: KernelFunction, tables: Value, column: Value, until: Value) -> None:
        """Write the tables of some vectors: their products with all entries."""
        form, x, book = self.form, f.pointer(Argument.X), f.pointer(Argument.TABLE)
        with f.loop(column, until) as at, f.loop(0, form.entries, LANES) as entry:
            parts = [f.load(book, FLOATS, (entry + form.entries * part) * FLOAT) for part in range(form.length)]
            for token in range(self.tokens):
                place = (f.size(Argument.COLUMNS) * token + at) * form.length
                products = f.constant(FLOATS, 0.0)
                for number, part in enumerate(parts):
                    products = part.fma(f.load(x, F32, (place + number) * FLOAT).splat(LANES), products)
                f.store(products, tables, ((at - column + self._vectors * token) * form.entries + entry) * FLOAT)

    def _look_up(self, f: KernelFunction, rows: Value, span: tuple[Value, Value], tables: Value, sums: Value) -> None:
        """Write the sums of a tile of rows over the vectors of a `span`."""
        form = self.form
        chains = [[f.variable(f.constant(FLOATS, 0.0)) for _ in range(4)] for _ in range(self.tokens)]
        with f.loop(*span, form.step) as column:
            base = f.behind(tables, (column - span[0]) * (form.entries * FLOAT))
            for at, codes in enumerate(_codes(form, f, rows, column)):
                for token, chain in enumerate(chains):
                    place = f.behind(base, (self._vectors * token + at) * form.entries * FLOAT)
                    total = chain[at % 4]
                    total.set(total.get() + f.target.lookup_floats(place, codes, form.entries))
        for token, chain in enumerate(chains):
            added, offset = reduce(Value.__add__, [part.get() for part in chain]), TILES * token * LANES * FLOAT
            f.store(f.load(sums, FLOATS, offset) + added, sums, offset)

    def _store(self, f: KernelFunction, rows: Value, sums: Value) -> None:
        """Write the sums of a tile to their rows."""
        scales = scales_of(f, self.form, rows * LANES)
        for token in range(self.tokens):
            whole = f.load(sums, FLOATS, TILES * token * LANES * FLOAT) * scales
            store_sums(f, whole, f.size(Argument.ROWS) * token + rows * LANES, self.bfloat16)


@dataclass(frozen=True)
class BookDecoding:
    """The matrix itself, transposed: `y [columns, rows]`, float32 or bfloat16."""

    form: BookCodes
    bfloat16: bool

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of row blocks."""
        form, book, size = self.form, f.pointer(Argument.TABLE), 2 if self.bfloat16 else FLOAT
        with f.loop(f.first, f.last) as rows:
            scales = scales_of(f, form, rows * LANES)
            with f.loop(0, f.size(Argument.COLUMNS), form.step) as column:
                for at, codes in enumerate(_codes(form, f, rows, column)):
                    with f.loop(0, form.length) as part:
                        entries = f.behind(book, part * (form.entries * FLOAT))
                        weights = f.target.lookup_floats(entries, codes, form.entries) * scales
                        place = ((column + at) * form.length + part) * f.size(Argument.ROWS) + rows * LANES
                        stored = weights.to_bfloat16() if self.bfloat16 else weights
                        f.store(stored, f.pointer(Argument.Y), place * size)


def _codes(form: BookCodes, f: KernelFunction, rows: Value, column: Value) -> list[Value]:
    """Write the codes of a tile of rows in the vectors from `column` on: int32 `[16]` each, in their low bytes."""
    [tiles] = form.tiles(f, rows, column)
    words = [tile.as_type(INTEGERS) for tile in tiles]
    return [word >> 8 * byte if byte else word for word in words for byte in range(4)]


# --- trellises with a table -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableStreams(Streams):
    """Streams of a trellis with a table, in the layout of those with a linear code."""

    centre: float = 0.0
    unit: float = 1.0

    @staticmethod
    def of(trellis: Trellis) -> TableStreams:
        """Return the form of a trellis."""
        return TableStreams(trellis.bits, trellis.values, trellis.memory, (), ())

    def vectors(self, f: KernelFunction, start: Value, block: Value, column: Value) -> list[Value]:
        """Write the weights of a block from a column on, without their scales: float32 `[16]`, four a tile.

        `start` is the address of `_write_table`. Two numbers of a state lie in one word, as bfloat16.
        """
        steps = (block * f.size(Argument.COLUMNS) + column) // self.columns
        place = f.behind(f.pointer(Argument.CODES), steps * self.plane_starts[-1])
        words = [
            [f.target.gather(start, self._states(f, place, phase, quarter)) for quarter in range(QUARTERS)]
            for phase in range(self.phases)
        ]
        if self.values == 1:
            return [word for quarters in words for word in quarters]
        halves = [[(q.as_type(INTEGERS) << 16).as_type(FLOATS) for q in qs] for qs in words]
        others = [[(q.as_type(INTEGERS) >> 16 << 16).as_type(FLOATS) for q in qs] for qs in words]
        return [word for low, high in zip(halves, others) for word in (*low, *high)]

    def _states(self, f: KernelFunction, place: Value, phase: int, quarter: int) -> Value:
        """Write the states after a code, int32 `[16]`."""
        end, window = (phase + 1) * self.bits, self.window(phase)
        states = f.constant(INTEGERS, 0)
        for at in window:
            octets = f.load(place, vector(I8, LANES), self.offset(at) + LANES * quarter)
            states = states << 8 | octets.wider(I32, False)
        return states >> (8 * window.stop - end) & ((1 << self.memory) - 1)


@dataclass(frozen=True)
class TableProduct:
    """`y += x @ W.T` for so many tokens of float32 inputs; with `bfloat16`, `y` is that, and set."""

    form: TableStreams
    tokens: int
    bfloat16: bool = False

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of row blocks."""
        form, start, columns = self.form, _write_table(f, self.form), f.size(Argument.COLUMNS)
        count = QUARTERS * tiles_of(form)
        with f.loop(f.first, f.last) as rows:
            sums = [[f.variable(f.constant(FLOATS, 0.0)) for _ in range(count)] for _ in range(self.tokens)]
            with f.loop(0, columns, form.columns) as column:
                x = [
                    f.load(f.pointer(Argument.X), vector(F32, form.columns), (columns * token + column) * 4)
                    for token in range(self.tokens)
                ]
                spread = [few.shuffle([lane % form.columns for lane in range(LANES)]) for few in x]
                for at, weights in enumerate(form.vectors(f, start, rows, column)):
                    for few, totals in zip(spread, sums):
                        totals[at].set(weights.fma(few, totals[at].get()))
            scales = _row_scales(f, form, rows)
            for token, totals in enumerate(sums):
                parts = [reduce(Value.__add__, _by_column(form, total.get())) for total in totals]
                whole = join(parts).shuffle(places_of_rows(form)) * scales
                store_sums(f, whole, f.size(Argument.ROWS) * token + rows * form.block_rows, self.bfloat16)


@dataclass(frozen=True)
class TableDecoding:
    """The matrix itself, transposed: `y [columns, rows]`, float32 or bfloat16."""

    form: TableStreams
    bfloat16: bool

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of row blocks."""
        form, start, size = self.form, _write_table(f, self.form), 2 if self.bfloat16 else FLOAT
        with f.loop(f.first, f.last) as rows:
            scales = _row_scales(f, form, rows)
            with f.loop(0, f.size(Argument.COLUMNS), form.columns) as column:
                vectors = [_by_column(form, weights) for weights in form.vectors(f, start, rows, column)]
                for share, parts in enumerate(zip(*vectors)):
                    whole = join(parts).shuffle(places_of_rows(form)) * scales
                    place = (column + share) * f.size(Argument.ROWS) + rows * form.block_rows
                    f.store(whole.to_bfloat16() if self.bfloat16 else whole, f.pointer(Argument.Y), place * size)


def _write_table(f: KernelFunction, form: TableStreams) -> Value:
    """Write the numbers of a trellis into the module, a word a state, and return their address."""
    numbers = table(Trellis(form.bits, form.values, form.memory))
    words = numbers if form.values == 1 else numbers.to(torch.bfloat16)
    raw = bytearray(words.contiguous().view(torch.uint8).numpy().tobytes())
    kind = ir.ArrayType(I8, len(raw))
    variable = ir.GlobalVariable(f.module, kind, "table")
    variable.linkage, variable.global_constant, variable.align = "internal", True, 64
    variable.initializer = ir.Constant(kind, raw)
    return Value(f, f.builder.bitcast(variable, ADDRESS))


def _by_column(form: TableStreams, values: Value) -> list[Value]:
    """Return the numbers of each of the neighbouring columns."""
    return [values.shuffle(range(share, LANES, form.columns)) for share in range(form.columns)]


def _row_scales(f: KernelFunction, form: TableStreams, rows: Value) -> Value:
    """Write the scales of a block of rows."""
    scales = []
    for tile in range(tiles_of(form)):
        place = (rows * tiles_of(form) + tile) * LANES
        scales.append(scales_of(f, form, place).shuffle(range(0, LANES, shares(form))))
    return join(scales).shuffle(places_of_rows(form))
