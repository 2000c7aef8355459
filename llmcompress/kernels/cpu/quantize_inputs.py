"""The kernel that prepares inputs: factors, a Hadamard transform, and rounding to two int8 numbers each.

A block of inputs has a scale, its largest magnitude over 127. An input is `(high + low / 254) * scale`, which loses at
most 1 / 64,516 of that magnitude. One int8 number loses up to 1 / 254, which moves the perplexity of a model of 4 bits
by 0.2 %. A second one costs little, since most time goes to reading and decoding the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.cpu.calls import Argument, KernelFunction, Values
from llmcompress.kernels.cpu.emit import F32, FLOATS, I8, I32, I64, LANES, Value, vector
from llmcompress.kernels.cpu.instruction_sets import join

BLOCK = 64  # columns of a block of inputs, unless a kernel wants others
ROUNDING = 12582912.0  # 1.5 * 2^23: numbers added to it are rounded to whole ones, to even
LARGEST = 127.0
SMALLEST = 1e-30  # a block of smaller numbers becomes zeros: LARGEST divided by them would overflow
TOGETHER = 8  # values of a transform that are read once for several stages
FINER = 254.0  # units of the low number in one of the high


@dataclass(frozen=True)
class Inputs:
    """Float32 or bfloat16 `[tokens, width]` to `X`, `X_SCALE` and `X_SUM` of blocks of `block` columns, padded by 0.

    An input becomes `numbers` int8, those of a block beside each other, the high ones first; with 0 numbers a float32,
    or a bfloat16 without sums if `rounded`. Inputs are multiplied by their factors first if there are `factors`; then a
    Hadamard transform of size `hadamard` (1: none) combines columns `width / hadamard` apart, as in `weight.hadamard`.
    Its normalisation belongs to the factors.
    """

    width: int
    block: int
    hadamard: int
    factors: bool
    numbers: int
    bfloat16: bool
    rounded: bool = False

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of tokens."""
        blocks = -(-self.width // self.block)
        source, scratch = f.pointer(Argument.CODES), f.pointer(Argument.Y)
        work = f.behind(scratch, f.arguments[1] * (4 * blocks * self.block))  # of one token, which stays in cache
        with f.loop(f.first, f.last) as token:
            row = f.behind(source, token * ((2 if self.bfloat16 else 4) * self.width))
            self._load(f, row, work, blocks * self.block)
            self._transform(f, work)
            with f.loop(0, blocks) as block:
                self._round(f, work, token * blocks + block, block)

    def _load(self, f: KernelFunction, row: Value, work: Value, padded: int) -> None:
        """Write inputs times factors, and zeros behind them."""
        factors = f.pointer(Argument.SCALES)

        def copy(place: Value, lanes: int) -> None:
            kind = vector(F32, lanes)
            x = f.load_bfloat16(row, lanes, place) if self.bfloat16 else f.load(row, kind, place * 4)
            f.store(x * f.load(factors, kind, place * 4) if self.factors else x, work, place * 4)

        _each(f, 0, self.width, copy)
        _each(f, self.width, padded, lambda place, lanes: f.store(f.constant(vector(F32, lanes), 0.0), work, place * 4))

    def _transform(self, f: KernelFunction, work: Value) -> None:
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
                    signs = f.constant(kind, [-1.0 if second else 1.0 for second in behind])
                    other = [lane + stage * apart * (-1 if second else 1) for lane, second in zip(lanes, behind)]
                    x = x.fma(signs, x.shuffle(other))
                f.store(x, work, place * 4)
            half = LANES
        while half < size:
            together = min(TOGETHER, size // half)
            self._run_stages(f, work, half * apart, together)
            half *= together

    def _run_stages(self, f: KernelFunction, work: Value, run: int, together: int) -> None:
        """Write the stages of a transform between numbers `run` apart, so many of them."""
        with f.loop(0, self.width, together * run) as start:

            def butterflies(place: Value, lanes: int) -> None:
                places = [(start + place + run * at) * 4 for at in range(together)]
                values = [f.load(work, vector(F32, lanes), at) for at in places]
                for value, at in zip(_transform(values), places):
                    f.store(value, work, at)

            _each(f, 0, run, butterflies)

    def _round(self, f: KernelFunction, work: Value, place: Value, block: Value) -> None:
        """Write a block of inputs, its scale and its sum."""
        values = [f.load(work, FLOATS, (block * self.block + at) * 4) for at in range(0, self.block, LANES)]
        start, at = place * self.block, place * 4
        if self.rounded:
            f.store(join(values).to_bfloat16(), f.pointer(Argument.X), start * 2)
            return
        if not self.numbers:
            for number, value in enumerate(values):
                f.store(value, f.pointer(Argument.X), (start + LANES * number) * 4)
            f.store(fold(reduce(Value.__add__, values), Value.__add__), f.pointer(Argument.X_SUM), at)
            return
        top = fold(reduce(Value.larger, map(Value.magnitude, values)), Value.larger)
        some = f.builder.fcmp_ordered(">", top.raw, f.constant(F32, SMALLEST).raw)
        inverse = f.constant(F32, LARGEST).over(top).raw
        inverse = Value(f, f.builder.select(some, inverse, f.constant(F32, 0.0).raw)).splat(LANES)
        scaled = [value * inverse for value in values]
        high = [_round_to_whole(value) for value in scaled]
        low = [_round_to_whole((value - whole) * FINER) for value, whole in zip(scaled, high)]
        for number, part in enumerate((high, low)[: self.numbers]):
            whole = [Value(f, f.builder.fptosi(value.raw, vector(I32, LANES))) for value in part]
            f.store(join(whole).narrower(I8), f.pointer(Argument.X), start * self.numbers + self.block * number)
        scale = top * (1 / LARGEST)
        f.store(scale, f.pointer(Argument.X_SCALE), at)
        parts = [whole + fine * (1 / FINER) for whole, fine in zip(high, low)] if self.numbers == 2 else high
        f.store(fold(reduce(Value.__add__, parts), Value.__add__) * scale, f.pointer(Argument.X_SUM), at)


def _transform(values: list[Value]) -> list[Value]:
    """Return the Hadamard transform of as many values as a power of two, stage by stage."""
    apart = 1
    while apart < len(values):
        pairs = [(values[at & ~apart], values[at | apart], at & apart) for at in range(len(values))]
        values = [first - second if behind else first + second for first, second, behind in pairs]
        apart *= 2
    return values


def _round_to_whole(value: Value) -> Value:
    return value + ROUNDING - ROUNDING


def _each(f: KernelFunction, start: int, stop: int, write: Callable[[Value, int], None]) -> None:
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


def fold(values: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Return all numbers of a vector combined, halves with halves."""
    while values.length > 1:
        half = values.length // 2
        values = combine(values.shuffle(range(half)), values.shuffle(range(half, 2 * half)))
    return values.at(0)


@dataclass(frozen=True, eq=False)
class InputBuffers:
    """Memory for the prepared inputs of some tokens: codes or floats, their scales, their sums, and working space."""

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @staticmethod
    def allocate(width: int, block: int, tokens: int, numbers: int) -> InputBuffers:
        """Return memory for so many tokens of `width` columns, in blocks of `block` columns."""
        blocks = -(-width // block)
        columns = blocks * block
        x = torch.empty(tokens, columns * max(numbers, 1), dtype=torch.int8 if numbers else torch.float32, device="cpu")
        rest = (x.new_empty(tokens, count, dtype=torch.float32) for count in (blocks, blocks, columns))
        tensors = (x, *rest)
        return InputBuffers(tensors, tuple(tensor.data_ptr() for tensor in tensors))


def input_values(factors: Tensor | None, x: int, addresses: tuple[int, ...]) -> Any:
    """Return the arguments of `Inputs` at the address `x`; `addresses`: of codes, scales, sums, and working space."""
    return Values(x, 0 if factors is None else factors.data_ptr(), 0, *addresses)
