"""Kernels of trellises with a table: a number for each state, float32, gathered from places of their own.

Thousands of numbers fit no register, so products read their inputs as they are, and are as fast as gathering is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from llvmlite import ir

from llmcompress.kernels.cpu.arguments import Argument, address, read
from llmcompress.kernels.cpu.emit import F32, I8, I32, I64, Function, Value, vector
from llmcompress.kernels.cpu.formats import Streams
from llmcompress.kernels.cpu.gather import FLOATS, LANES, gathered
from llmcompress.kernels.cpu.instruction_sets import Instructions, joined
from llmcompress.kernels.cpu.product import ADDRESS, give, places_of_rows, scales_of, shares, tiles_of
from llmcompress.weight.trellis import Trellis, table

QUARTERS = 4  # vectors of a tile


@dataclass(frozen=True)
class TableStreams(Streams):
    """Streams of a trellis with a table, laid out as those of a linear code."""

    centre: float = 0.0
    unit: float = 1.0

    @staticmethod
    def of(trellis: Trellis) -> TableStreams:
        """Return the form of a trellis."""
        return TableStreams(trellis.bits, trellis.values, trellis.memory, (), ())

    def vectors(self, target: Instructions, f: Function, start: Value, block: Value, column: Value) -> list[Value]:
        """Write the weights of a block from a column on, but for their scales: float32 `[16]`, four a tile.

        `start` is the address of the `table_in` a module. Two numbers of a state lie in one word, as bfloat16.
        """
        steps = (block * read(f, Argument.COLUMNS) + column) // self.columns
        place = f.behind(address(f, Argument.CODES), steps * self.plane_starts[-1])
        words = [
            [gathered(target, f, start, self._states(f, place, phase, quarter)) for quarter in range(QUARTERS)]
            for phase in range(self.phases)
        ]
        if self.values == 1:
            return [word for quarters in words for word in quarters]
        whole, kind = vector(I32, LANES), FLOATS
        halves = [[(q.as_type(whole) << 16).as_type(kind) for q in qs] for qs in words]
        others = [[(q.as_type(whole) >> 16 << 16).as_type(kind) for q in qs] for qs in words]
        return [word for low, high in zip(halves, others) for word in (*low, *high)]

    def _states(self, f: Function, place: Value, phase: int, quarter: int) -> Value:
        """Write the states after a code, int32 `[16]`."""
        end, window = (phase + 1) * self.bits, self.window(phase)
        found = f.constant(vector(I32, LANES), 0)
        for at in window:
            shift, plane = divmod(at, self.unit_bytes)
            offset = self.plane_starts[plane] + (self.history(plane) + shift) * self.columns + LANES * quarter
            found = found << 8 | f.load(place, vector(I8, LANES), offset).wider(I32, False)
        return found >> (8 * window.stop - end) & ((1 << self.memory) - 1)


def table_in(f: Function, form: TableStreams) -> Value:
    """Return the address of the numbers of a trellis, in the module itself: a word a state."""
    numbers = table(Trellis(form.bits, form.values, form.memory))
    held = numbers if form.values == 1 else numbers.to(torch.bfloat16)
    raw = bytearray(held.contiguous().view(torch.uint8).numpy().tobytes())
    kind = ir.ArrayType(I8, len(raw))
    found = ir.GlobalVariable(f.module, kind, "table")
    found.linkage, found.global_constant, found.align = "internal", True, 64
    found.initializer = ir.Constant(kind, raw)
    return Value(f, f.builder.bitcast(found, ADDRESS))


@dataclass(frozen=True)
class TableProduct:
    """`y += x @ W.T` for so many tokens of float32 inputs; with `bfloat16`, `y` is that, and set."""

    form: TableStreams
    tokens: int
    bfloat16: bool = False

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of row blocks."""
        f = Function(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        form, start, columns = self.form, table_in(f, self.form), read(f, Argument.COLUMNS)
        count = QUARTERS * tiles_of(form)
        with f.loop(f.arguments[1], f.arguments[2]) as rows:
            sums = [[f.variable(f.constant(FLOATS, 0.0)) for _ in range(count)] for _ in range(self.tokens)]
            with f.loop(0, columns, form.columns) as column:
                x = [
                    f.load(address(f, Argument.X), vector(F32, form.columns), (columns * token + column) * 4)
                    for token in range(self.tokens)
                ]
                spread = [few.shuffled([lane % form.columns for lane in range(LANES)]) for few in x]
                for at, weights in enumerate(form.vectors(target, f, start, rows, column)):
                    for few, totals in zip(spread, sums):
                        totals[at].set(weights.fma(few, totals[at].get()))
            scales = _scales(f, form, rows)
            for token, totals in enumerate(sums):
                parts = [reduce(Value.__add__, _by_column(form, total.get())) for total in totals]
                whole = joined(parts).shuffled(places_of_rows(form)) * scales
                give(f, whole, read(f, Argument.ROWS) * token + rows * form.block_rows, self.bfloat16)
        f.finish()


@dataclass(frozen=True)
class TableDecoding:
    """The matrix itself, transposed: `y [columns, rows]`, float32 or bfloat16."""

    form: TableStreams
    bfloat16: bool

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of row blocks."""
        f = Function(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        form, start, size = self.form, table_in(f, self.form), 2 if self.bfloat16 else 4
        with f.loop(f.arguments[1], f.arguments[2]) as rows:
            scales = _scales(f, form, rows)
            with f.loop(0, read(f, Argument.COLUMNS), form.columns) as column:
                found = [_by_column(form, weights) for weights in form.vectors(target, f, start, rows, column)]
                for share, parts in enumerate(zip(*found)):
                    whole = joined(parts).shuffled(places_of_rows(form)) * scales
                    place = (column + share) * read(f, Argument.ROWS) + rows * form.block_rows
                    f.store(whole.to_bfloat16() if self.bfloat16 else whole, address(f, Argument.Y), place * size)
        f.finish()


def _by_column(form: TableStreams, values: Value) -> list[Value]:
    """Return what belongs to each of the columns beside each other."""
    return [values.shuffled(range(share, LANES, form.columns)) for share in range(form.columns)]


def _scales(f: Function, form: TableStreams, rows: Value) -> Value:
    """Write the scales of a block of rows."""
    found = []
    for tile in range(tiles_of(form)):
        place = (rows * tiles_of(form) + tile) * LANES
        found.append(scales_of(f, form, place).shuffled(range(0, LANES, shares(form))))
    return joined(found).shuffled(places_of_rows(form))
