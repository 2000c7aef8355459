"""Kernels of codebooks, whose codes number vectors of columns.

A product first multiplies a token by all entries, in a table for each vector of the inputs, and then adds one number of
that table for each code, instead of a product for each weight. Some vectors are taken at a time, with tables that stay
in the first cache while many rows look numbers up.

Entries are an argument: layers whose codebooks have one size share a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from llvmlite import ir

from llmcompress.kernels.cpu.arguments import Argument, address, read
from llmcompress.kernels.cpu.emit import F32, I64, Function, Value
from llmcompress.kernels.cpu.formats import IntegerPlanes
from llmcompress.kernels.cpu.gather import FLOATS, LANES, entries_of
from llmcompress.kernels.cpu.instruction_sets import Instructions
from llmcompress.kernels.cpu.product import ADDRESS, INTEGERS, give, scales_of

TABLES = 1 << 15  # bytes of the tables at a time, but for the fewest vectors that are read at once
TILES = 128  # of rows, whose sums wait in the stack while the tables change
FLOAT = 4  # bytes
NOTHING = -0.0  # what sums begin with; of 0.0, LLVM would make a call of memset, and kernels call nothing


@dataclass(frozen=True)
class BookCodes(IntegerPlanes):
    """Codes of vectors of `length` columns, laid out as integers are; a column of theirs is a vector."""

    length: int = 1

    @property
    def entries(self) -> int:
        """Entries of a table, in whole vectors of the kernel: those that have no code are 0."""
        return max(LANES, 1 << self.bits)

    @property
    def input_block(self) -> int:
        """Columns of the inputs that the codes read at once stand for."""
        return self.step * self.length


@dataclass(frozen=True)
class BookProduct:
    """`y += x @ W.T` for so many tokens of float32 inputs; with `bfloat16`, `y` is that, and set."""

    form: BookCodes
    tokens: int
    bfloat16: bool = False

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of row blocks."""
        f = Function(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        columns, first, last = read(f, Argument.COLUMNS), *f.arguments[1:]
        tables = f.room(FLOATS, self._vectors * self.form.entries // LANES * self.tokens)
        sums = f.room(FLOATS, TILES * self.tokens)
        with f.loop(first, last, TILES) as start:
            stop = _smaller(start + TILES, last)
            with f.loop(0, TILES * self.tokens) as place:
                f.store(f.constant(FLOATS, NOTHING), sums, place * (LANES * FLOAT))
            with f.loop(0, columns, self._vectors) as column:
                until = _smaller(column + self._vectors, columns)
                self._multiply(f, tables, column, until)
                with f.loop(start, stop) as rows:
                    totals = f.behind(sums, (rows - start) * (LANES * FLOAT))
                    self._look_up(f, target, rows, (column, until), (tables, totals))
            with f.loop(start, stop) as rows:
                self._add(f, rows, f.behind(sums, (rows - start) * (LANES * FLOAT)))
        f.finish()

    @property
    def _vectors(self) -> int:
        """Vectors whose tables are held at once."""
        step = self.form.step
        return max(step, TABLES // (FLOAT * self.form.entries * self.tokens) // step * step)

    def _multiply(self, f: Function, tables: Value, column: Value, until: Value) -> None:
        """Write the tables of some vectors: their products with all entries."""
        form, x, book = self.form, address(f, Argument.X), address(f, Argument.TABLE)
        with f.loop(column, until) as at, f.loop(0, form.entries, LANES) as entry:
            parts = [f.load(book, FLOATS, (entry + form.entries * part) * FLOAT) for part in range(form.length)]
            for token in range(self.tokens):
                place = (read(f, Argument.COLUMNS) * token + at) * form.length
                found = f.constant(FLOATS, 0.0)
                for number, part in enumerate(parts):
                    found = part.fma(f.load(x, F32, (place + number) * FLOAT).splat(LANES), found)
                f.store(found, tables, ((at - column + self._vectors * token) * form.entries + entry) * FLOAT)

    def _look_up(
        self, f: Function, target: Instructions, rows: Value, span: tuple[Value, Value], places: tuple[Value, Value]
    ) -> None:
        """Write the sums of a tile of rows over the vectors of a `span`; `places`: of their tables, of the sums."""
        form, (tables, sums) = self.form, places
        chains = [[f.variable(f.constant(FLOATS, 0.0)) for _ in range(4)] for _ in range(self.tokens)]
        with f.loop(*span, form.step) as column:
            here = f.behind(tables, (column - span[0]) * (form.entries * FLOAT))
            for at, codes in enumerate(_codes(form, target, f, rows, column)):
                for token, chain in enumerate(chains):
                    table = f.behind(here, (self._vectors * token + at) * form.entries * FLOAT)
                    one = chain[at % 4]
                    one.set(one.get() + entries_of(target, f, table, codes, form.entries))
        for token, chain in enumerate(chains):
            total, place = reduce(Value.__add__, [one.get() for one in chain]), TILES * token * LANES * FLOAT
            f.store(f.load(sums, FLOATS, place) + total, sums, place)

    def _add(self, f: Function, rows: Value, sums: Value) -> None:
        """Write the sums of a tile to their rows."""
        scales = scales_of(f, self.form, rows * LANES)
        for token in range(self.tokens):
            whole = f.load(sums, FLOATS, TILES * token * LANES * FLOAT) * scales
            give(f, whole, read(f, Argument.ROWS) * token + rows * LANES, self.bfloat16)


@dataclass(frozen=True)
class BookDecoding:
    """The matrix itself, transposed: `y [columns, rows]`, float32 or bfloat16."""

    form: BookCodes
    bfloat16: bool

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of row blocks."""
        f = Function(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        form, book, size = self.form, address(f, Argument.TABLE), 2 if self.bfloat16 else FLOAT
        with f.loop(f.arguments[1], f.arguments[2]) as rows:
            scales = scales_of(f, form, rows * LANES)
            with f.loop(0, read(f, Argument.COLUMNS), form.step) as column:
                for at, codes in enumerate(_codes(form, target, f, rows, column)):
                    with f.loop(0, form.length) as part:
                        table = f.behind(book, part * (form.entries * FLOAT))
                        found = entries_of(target, f, table, codes, form.entries) * scales
                        place = ((column + at) * form.length + part) * read(f, Argument.ROWS) + rows * LANES
                        f.store(found.to_bfloat16() if self.bfloat16 else found, address(f, Argument.Y), place * size)
        f.finish()


def _codes(form: BookCodes, target: Instructions, f: Function, rows: Value, column: Value) -> list[Value]:
    """Write the codes of a tile of rows in the vectors from `column` on: int32 `[16]` each, in their low bytes."""
    [tiles] = form.tiles(target, f, rows, column)
    words = [tile.as_type(INTEGERS) for tile in tiles]
    return [word >> 8 * byte if byte else word for word in words for byte in range(4)]


def _smaller(first: Value, second: Value) -> Value:
    return first.function.call("llvm.smin", I64, first, second, overloads=(I64,))
