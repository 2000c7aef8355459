"""The kernel that prepares inputs: factors, a Hadamard transform, and rounding to two int8 numbers each.

A block of inputs has a scale, its largest magnitude over 127. An input is `(high + low / 254) * scale`, which loses at
most 1 / 64,516 of that magnitude. One int8 number loses up to 1 / 254, which moves the perplexity of a model of 4 bits
by 0.2 %; a second one costs a product of integers, and what takes time is to read and decode the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from llvmlite import ir

from llmcompress.kernels.cpu.arguments import Argument, address
from llmcompress.kernels.cpu.emit import F32, I8, I16, I32, I64, Function, Value, vector
from llmcompress.kernels.cpu.instruction_sets import Instructions, joined

LANES = 16
FLOATS = vector(F32, LANES)
ROUNDING = 12582912.0  # 1.5 * 2^23: what is added to it is rounded to whole numbers, to even
LARGEST = 127.0
TOGETHER = 8  # values of a transform that are read once for several of its stages
FINER = 254.0  # units of the low number in one of the high


@dataclass(frozen=True)
class Inputs:
    """Float32 or bfloat16 `[tokens, width]` to `X`, `X_SCALE` and `X_SUM` of blocks of `block` columns.

    The last block is padded by 0.

    `numbers` int8 stand for an input, those of a block beside each other, the high ones first; 0: it is a float32, or
    a bfloat16 without sums if `rounded`. Each input is multiplied by its factor first if there are `factors`; then a
    Hadamard transform of `hadamard` (1: none) goes over columns `width / hadamard` apart, as in `weight.hadamard`. Its
    normalisation belongs to the factors.
    """

    width: int
    block: int
    hadamard: int
    factors: bool
    numbers: int
    bfloat16: bool
    rounded: bool = False

    def write(self, module: ir.Module, target: Instructions) -> None:
        """Write the kernel into a module, for a range of tokens."""
        f = Function(module, "kernel", [I8.as_pointer(), I64, I64], target.tier.fused)
        blocks = -(-self.width // self.block)
        source, scratch = address(f, Argument.CODES), address(f, Argument.Y)
        work = f.behind(scratch, f.arguments[1] * (4 * blocks * self.block))  # of one token, which stays in cache
        with f.loop(f.arguments[1], f.arguments[2]) as token:
            row = f.behind(source, token * ((2 if self.bfloat16 else 4) * self.width))
            self._load(f, row, work, blocks * self.block)
            self._transform(f, work)
            with f.loop(0, blocks) as block:
                self._round(f, work, token * blocks + block, block)
        f.finish()

    def _load(self, f: Function, row: Value, work: Value, padded: int) -> None:
        """Write inputs times factors, and zeros behind them."""
        factors = address(f, Argument.SCALES)

        def copy(place: Value, lanes: int) -> None:
            kind = vector(F32, lanes)
            if self.bfloat16:
                x = (f.load(row, vector(I16, lanes), place * 2).wider(I32, False) << 16).as_type(kind)
            else:
                x = f.load(row, kind, place * 4)
            f.store(x * f.load(factors, kind, place * 4) if self.factors else x, work, place * 4)

        _each(f, 0, self.width, copy)
        _each(f, self.width, padded, lambda place, lanes: f.store(f.constant(vector(F32, lanes), 0.0), work, place * 4))

    def _transform(self, f: Function, work: Value) -> None:
        """Write the Hadamard transform, in place."""
        apart = self.width // self.hadamard
        half, size = 1, self.hadamard
        if apart in (1, 3) and size >= LANES:  # pairs lie within one vector, or three
            lanes = range(LANES * apart)
            kind = vector(F32, len(lanes))
            with f.loop(0, self.width, len(lanes)) as place:
                x = f.load(work, kind, place * 4)
                for stage in (1, 2, 4, 8):
                    behind = [bool(lane // apart & stage) for lane in lanes]
                    signs = f.constant(kind, [-1.0 if one else 1.0 for one in behind])
                    other = [lane + stage * apart * (-1 if one else 1) for lane, one in zip(lanes, behind)]
                    x = x.fma(signs, x.shuffled(other))
                f.store(x, work, place * 4)
            half = LANES
        while half < size:
            together = min(TOGETHER, size // half)
            self._stages(f, work, half * apart, together)
            half *= together

    def _stages(self, f: Function, work: Value, run: int, together: int) -> None:
        """Write the stages of a transform between numbers `run` apart, so many of them."""
        with f.loop(0, self.width, together * run) as start:

            def butterflies(place: Value, lanes: int) -> None:
                places = [(start + place + run * at) * 4 for at in range(together)]
                values = [f.load(work, vector(F32, lanes), at) for at in places]
                for value, at in zip(_transformed(values), places):
                    f.store(value, work, at)

            _each(f, 0, run, butterflies)

    def _round(self, f: Function, work: Value, place: Value, block: Value) -> None:
        """Write a block of inputs, its scale and its sum."""
        values = [f.load(work, FLOATS, (block * self.block + at) * 4) for at in range(0, self.block, LANES)]
        start, at = place * self.block, place * 4
        if self.rounded:
            f.store(joined(values).to_bfloat16(), address(f, Argument.X), start * 2)
            return
        if not self.numbers:
            for number, value in enumerate(values):
                f.store(value, address(f, Argument.X), (start + LANES * number) * 4)
            f.store(_folded(reduce(Value.__add__, values), Value.__add__), address(f, Argument.X_SUM), at)
            return
        top = _folded(reduce(Value.larger, map(Value.magnitude, values)), Value.larger)
        some = f.builder.fcmp_ordered(">", top.raw, f.constant(F32, 0.0).raw)
        inverse = f.builder.fdiv(f.constant(F32, LARGEST).raw, top.raw)
        inverse = Value(f, f.builder.select(some, inverse, f.constant(F32, 0.0).raw)).splat(LANES)
        scaled = [value * inverse for value in values]
        high = [_rounded(value) for value in scaled]
        low = [_rounded((value - whole) * FINER) for value, whole in zip(scaled, high)]
        for number, part in enumerate((high, low)[: self.numbers]):
            whole = [Value(f, f.builder.fptosi(value.raw, vector(I32, LANES))) for value in part]
            f.store(joined(whole).narrower(I8), address(f, Argument.X), start * self.numbers + self.block * number)
        scale = top * (1 / LARGEST)
        f.store(scale, address(f, Argument.X_SCALE), at)
        parts = [whole + fine * (1 / FINER) for whole, fine in zip(high, low)] if self.numbers == 2 else high
        f.store(_folded(reduce(Value.__add__, parts), Value.__add__) * scale, address(f, Argument.X_SUM), at)


def _transformed(values: list[Value]) -> list[Value]:
    """Return the Hadamard transform of as many values as a power of two, stage by stage."""
    apart = 1
    while apart < len(values):
        pairs = [(values[at & ~apart], values[at | apart], at & apart) for at in range(len(values))]
        values = [first - second if behind else first + second for first, second, behind in pairs]
        apart *= 2
    return values


def _rounded(value: Value) -> Value:
    return value + ROUNDING - ROUNDING


def _each(f: Function, start: int, stop: int, write: Callable[[Value, int], None]) -> None:
    """Write `write(place, lanes)` for all numbers from `start` to below `stop`: whole vectors, then the rest."""
    whole = start + (stop - start) // LANES * LANES
    if whole > start:
        with f.loop(start, whole, LANES) as place:
            write(place, LANES)
    lanes = LANES
    while whole < stop:
        lanes //= 2
        if (stop - whole) & lanes:
            write(f.constant(I64, whole), lanes)
            whole += lanes


def _folded(values: Value, join: Callable[[Value, Value], Value]) -> Value:
    """Return all numbers of a vector joined, halves with halves."""
    while values.length > 1:
        half = values.length // 2
        values = join(values.shuffled(range(half)), values.shuffled(range(half, 2 * half)))
    return values.at(0)
