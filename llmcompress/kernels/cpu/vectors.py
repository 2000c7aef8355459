"""Kernels of vectors: sums, gates, conversions, and products with small dense matrices, of one token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Literal

from llmcompress.kernels.cpu.calls import OWN, KernelFunction
from llmcompress.kernels.cpu.emit import F32, FLOATS, I16, I32, I64, LANES, Value, vector
from llmcompress.kernels.cpu.quantize_inputs import ROUNDING, fold

LOG2 = 1.44269504  # of e
LN2 = (0.693359375, -2.12194440e-4)  # its high bits, and the rest
EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
GELU = (0.7978845608, 0.044715)  # the root of 2 / pi, and the factor of the cube
ROWS = 16  # of a dense matrix, which a thread multiplies at once


class CombineArgument(IntEnum):
    """The place of an argument; tensors are bfloat16 `[width]`."""

    FIRST = OWN
    SECOND = auto()
    RESULT = auto()


@dataclass(frozen=True)
class Combine:
    """The sum of two vectors, or the second times a function of the first (`gelu` by tanh)."""

    width: int
    gate: Literal["silu", "gelu"] | None

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for one block."""
        first, second, result = map(f.pointer, CombineArgument)

        def combine(place: Value, lanes: int) -> None:
            a, b = (f.load_bfloat16(source, lanes, place) for source in (first, second))
            value = a + b if self.gate is None else round_short(a.over(self._divisor(a))) * b
            f.store(value.to_bfloat16(), result, place * 2)

        with f.loop(f.first, f.last):
            f.each(f.constant(I64, self.width), combine)

    def _divisor(self, x: Value) -> Value:
        """Return what the gate divides x by: 1 + exp(-x) or, as (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)), likewise."""
        power = x * -1.0 if self.gate == "silu" else (x * x * x * GELU[1] + x) * (-2.0 * GELU[0])
        return exponential(power) + 1.0


class MoveArgument(IntEnum):
    """The place of an argument."""

    SOURCE = OWN
    PLACES = auto()  # int64 [width], of "gather"
    RESULT = auto()


@dataclass(frozen=True)
class Move:
    """A vector from a vector: `clear` writes float32 zeros, `round` makes float32 numbers bfloat16, `add` adds float32
    numbers to others, `gather` takes bfloat16 numbers from places."""

    width: int
    change: Literal["clear", "round", "add", "gather"]

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for one block."""
        source, places, result = map(f.pointer, MoveArgument)

        def move(place: Value, lanes: int) -> None:
            kind = vector(F32, lanes)
            match self.change:
                case "clear":
                    f.store(f.constant(kind, 0.0), result, place * 4)
                case "round":
                    f.store(f.load(source, kind, place * 4).to_bfloat16(), result, place * 2)
                case "add":
                    f.store(f.load(result, kind, place * 4) + f.load(source, kind, place * 4), result, place * 4)

        with f.loop(f.first, f.last):
            if self.change != "gather":
                f.each(f.constant(I64, self.width), move)
                return
            with f.loop(0, self.width) as place:
                f.store(f.load(source, I16, f.load(places, I64, place * 8) * 2), result, place * 2)


class DenseArgument(IntEnum):
    """The place of an argument."""

    MATRIX = OWN  # bfloat16 [rows, columns]
    X = auto()  # float32 [columns]
    Y = auto()  # float32 [rows], added to


@dataclass(frozen=True)
class DenseProduct:
    """`y += W x` for a dense `W [rows, columns]`. A block is `ROWS` rows."""

    rows: int
    columns: int

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of blocks of rows."""
        matrix, x, y = map(f.pointer, DenseArgument)
        last = (f.last * ROWS).least(f.constant(I64, self.rows))
        with f.loop(f.first * ROWS, last) as row:
            total, rest = f.variable(f.constant(FLOATS, 0.0)), f.variable(f.constant(vector(F32, 1), 0.0))

            def add(place: Value, lanes: int) -> None:
                own = total if lanes == LANES else rest
                weight = f.load_bfloat16(matrix, lanes, row * self.columns + place)
                own.set(weight.fma(f.load(x, weight.type, place * 4), own.get()))

            f.each(f.constant(I64, self.columns), add)
            product = fold(total.get(), Value.__add__) + rest.get().at(0)
            f.store(f.load(y, F32, row * 4) + product, y, row * 4)


def round_short(value: Value) -> Value:
    """Return float32 numbers rounded to bfloat16."""
    return from_bfloat16(value.to_bfloat16())


def from_bfloat16(bits: Value) -> Value:
    """Return numbers of bfloat16, as int16, in float32."""
    return (bits.wider(I32, False) << 16).as_type(vector(F32, bits.length))


def exponential(x: Value) -> Value:
    """Return e to these floats, to 7 digits (Cephes' expf); 0 below -87."""
    f = x.function
    bounded = x.smaller(f.constant(x.type, 88.0)).larger(f.constant(x.type, -87.3))
    shifted = bounded * LOG2 + ROUNDING
    power = shifted - ROUNDING
    rest = bounded - power * LN2[0] - power * LN2[1]
    series = f.constant(x.type, EXPONENTIAL[0])
    for factor in EXPONENTIAL[1:]:
        series = series.fma(rest, f.constant(x.type, factor))
    series = series.fma(rest * rest, rest + 1.0)
    whole = vector(I32, x.length)
    bits = f.constant(x.type, ROUNDING).as_type(whole)
    return series * ((shifted.as_type(whole) - bits + 127) << 23).as_type(x.type)
