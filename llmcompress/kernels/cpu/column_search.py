"""The kernel for CPUs that chooses the streams of a trellis for a `ColumnBlock`.

States that share all but their oldest code form butterflies: the keys of 2^bits states before a step decide those of
2^bits states after it. With few codes, vectors run along the butterflies, and keys change places after a step; with
many (`WIDE`), vectors run along the newest codes, in the order of states.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import reduce

import torch
from llvmlite import ir
from torch import Tensor

from llmcompress.kernels.column_block import CAP, COST, EVERY, SEAM, WHOLE, WIDEST, ColumnBlock, Numbers, longest_stream
from llmcompress.kernels.cpu.build import load_kernel
from llmcompress.kernels.cpu.calls import OWN, KernelFunction, address_of, launch, own_values
from llmcompress.kernels.cpu.emit import F32, I8, I32, I64, LANES, Value, vector
from llmcompress.kernels.cpu.instruction_sets import TILE

WIDE = 4  # bits of a code from which on vectors run along the newest codes


class SearchArgument(IntEnum):
    """The place of an argument; tensors are float32 unless they say otherwise."""

    CURRENT = OWN  # [columns, rows]
    BEFORE = auto()  # alike
    WEIGHTS = auto()  # [rows]
    FACTORS = auto()  # [rows]
    SHARES = auto()  # [columns, columns]
    NUMBERS = auto()  # in the order of `order_numbers`
    TABLE = auto()  # [values, states]
    OLDEST = auto()  # int32 [rest]: the oldest code of the states before a step
    EDGES = auto()  # int32 [streams + 2], the last one the steps of the longest stream
    ENDS = auto()  # int32 [columns + 1, streams]
    STATES = auto()  # int32 [columns, steps]
    ERRORS = auto()  # [columns, rows]
    ROOM = auto()  # bytes [streams, `room` of the kernel]
    COLUMNS = auto()
    STEPS = auto()  # of a column
    STREAMS = auto()
    FIRST = auto()  # the stream that the kernel's first block is
    TOP = auto()  # bits of a float32: the largest magnitude of a number


@dataclass(frozen=True)
class ColumnSearch:
    """The kernel for a trellis of these sizes.

    `ring`: True if columns go round; `feeds`: True if errors move later columns; `again`: True if columns were stored
    before, so that an error is the change of a column.
    """

    bits: int
    values: int
    memory: int
    ring: bool
    feeds: bool
    again: bool

    @property
    def parts(self) -> int:
        """Codes of a step."""
        return 1 << self.bits

    @property
    def rest(self) -> int:
        """States without their oldest code."""
        return 1 << (self.memory - self.bits)

    @property
    def inner(self) -> int:
        """Butterflies."""
        return 1 << (self.memory - 2 * self.bits)

    def room(self, steps: int) -> int:
        """Return the bytes of working space of a stream of so many steps."""
        return 8 * steps * self.values + 8 * self.rest + steps * self.rest

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of streams."""
        with f.loop(f.first, f.last) as number:
            stream = f.size(SearchArgument.FIRST) + number
            first, last = (f.item(SearchArgument.EDGES, I32, stream + more).wider(I64) for more in (0, 1))
            steps = last - first
            most = f.item(SearchArgument.EDGES, I32, f.size(SearchArgument.STREAMS) + 1).wider(I64)
            room = f.behind(
                f.pointer(SearchArgument.ROOM), number * (most * (8 * self.values + self.rest) + 8 * self.rest)
            )
            slopes, shifts = room, f.behind(room, most * (4 * self.values))
            keys = f.behind(shifts, most * (4 * self.values))
            oldest = f.behind(keys, 8 * self.rest)
            with f.loop(0, f.size(SearchArgument.COLUMNS)) as column:
                row = column * f.size(SearchArgument.STEPS) * self.values + first * self.values
                self._prepare(f, (row, first * self.values, steps * self.values), slopes, shifts)
                ends = column * f.size(SearchArgument.STREAMS) + stream
                end = ends + f.size(SearchArgument.STREAMS)
                if self.ring:
                    start = stop = self._find_seam(f, (first, steps), (slopes, shifts, keys, oldest))
                else:
                    start, stop = (f.item(SearchArgument.ENDS, I32, place).wider(I64) for place in (ends, end))
                self._enter(f, keys, start)
                self._advance(f, (first, steps), (slopes, shifts, keys, oldest))
                best = self._cheapest(f, self._after(f, keys, steps), stop)
                state = self._trace(f, (column, first, steps), oldest, best)
                f.store(state, f.pointer(SearchArgument.ENDS), end * 4)
                if self.feeds:
                    self._feed(f, column, (first * self.values, steps * self.values))

    def _prepare(self, f: KernelFunction, place: tuple[Value, Value, Value], slopes: Value, shifts: Value) -> None:
        """Write the terms of costs of a number x, `weight x^2 + slope x + shift`."""
        row, first, count = place
        top = f.size(SearchArgument.TOP).narrower(I32).as_type(F32)

        def write(at: Value, lanes: int) -> None:
            kind = vector(F32, lanes)
            factor = f.item(SearchArgument.FACTORS, kind, first + at)
            wanted = f.item(SearchArgument.CURRENT, kind, row + at)
            some = f.builder.fcmp_ordered(">", factor.raw, f.constant(kind, 0.0).raw)
            scaled = f.builder.fdiv(wanted.raw, factor.raw)
            x = Value(f, f.builder.select(some, scaled, f.constant(kind, 0.0).raw))
            x = x.larger(f.constant(kind, -WIDEST)).smaller(f.constant(kind, WIDEST))
            weight = f.item(SearchArgument.WEIGHTS, kind, first + at)
            over = (x.magnitude() - top.splat(lanes)).larger(f.constant(kind, 0.0))
            f.store(x * weight * -2.0, slopes, at * 4)
            f.store((x * x - over * over) * weight, shifts, at * 4)

        f.each(count, write)

    def _find_seam(self, f: KernelFunction, where: tuple[Value, Value], room: tuple[Value, ...]) -> Value:
        """Return the state between the end of a ring and its start, without its oldest code."""
        first, steps = where
        _, _, keys, oldest = room
        side = (steps >> 1).least(f.constant(I64, SEAM // self.values))
        self._enter(f, keys, None)
        self._advance(f, (first, steps), room, (steps - side, side * 2))
        place = f.variable(self._cheapest(f, keys, f.constant(I64, -1)))  # after an even number of steps
        with f.loop(0, side) as back:
            place.set(self._whole_state(f, oldest, side * 2 - 1 - back, place.get()) >> self.bits)
        return place.get()

    def _enter(self, f: KernelFunction, keys: Value, start: Value | None) -> None:
        """Write keys by which only the state `start` is reached; None: by which all are."""
        lanes = min(LANES, self.rest)
        with f.loop(0, self.rest, lanes) as at:
            before = f.item(SearchArgument.OLDEST, vector(I32, lanes), at)
            f.store(before if start is None else before | CAP, keys, at * 4)
        if start is not None:
            start = start & (self.rest - 1)
            f.store(f.item(SearchArgument.OLDEST, I32, start), keys, start * 4)

    def _after(self, f: KernelFunction, keys: Value, steps: Value) -> Value:
        """Return where keys lie after so many steps: after an even number in the first half of their room."""
        return f.behind(keys, (steps & 1) * (4 * self.rest))

    def _advance(
        self,
        f: KernelFunction,
        where: tuple[Value, Value],
        room: tuple[Value, ...],
        turn: tuple[Value, Value] | None = None,
    ) -> None:
        """Take all steps, or as `turn` says from a first one on so many, beyond the last one those of the start."""
        first, steps = where
        begin, count = turn or (f.constant(I64, 0), steps)
        slopes, shifts, keys, oldest = room
        with f.loop(0, count, EVERY) as chunk:
            stop = (chunk + EVERY).least(count)
            with f.loop(chunk, stop) as place:
                step = begin + place
                step = step if turn is None else step - step // steps * steps
                costs = []
                shift = f.constant(F32, 0.0)
                for value in range(self.values):
                    at = step * self.values + value
                    weight = f.item(SearchArgument.WEIGHTS, F32, first * self.values + at)
                    costs.append((f.load(slopes, F32, at * 4), weight))
                    part = f.load(shifts, F32, at * 4)
                    shift = part if value == 0 else shift + part
                halves = [self._after(f, keys, place + more) for more in (0, 1)]
                row = f.behind(oldest, place * self.rest)
                move = self._move_wide if self.bits >= WIDE else self._move_narrow
                move(f, (halves[0], halves[1], row), _Costs(costs, shift + WHOLE))
            self._subtract_lowest(f, self._after(f, keys, stop))

    def _move_narrow(self, f: KernelFunction, rows: tuple[Value, Value, Value], costs: _Costs) -> None:
        """One step, vectors along butterflies."""
        before_step, after_step, oldest = rows
        few = self.bits > 1 and f.target.tier.shuffle < TILE  # 16 numbers of each of 4 codes overflow narrow registers
        lanes = min(LANES // 2 if few else LANES, self.inner)
        kind = vector(I32, lanes)
        with f.loop(0, self.inner, lanes) as middle:
            before = [f.load(before_step, kind, (middle + old * self.inner) * 4) for old in range(self.parts)]
            lows = []
            for newest in range(self.parts):
                keys = []
                for old in range(self.parts):
                    place = (newest * self.parts + old) * self.inner
                    keys.append(before[old] + self._cost(f, costs, middle + place, lanes))
                lows.append(reduce(_lower, keys))
                f.store(lows[-1].narrower(I8), oldest, middle + newest * self.inner)
            for number, part in enumerate(_interleave(lows)):
                self._keep(f, part, after_step, middle * self.parts + number * lanes)

    def _move_wide(self, f: KernelFunction, rows: tuple[Value, Value, Value], costs: _Costs) -> None:
        """One step, vectors along the newest codes."""
        before_step, after_step, oldest = rows
        with f.loop(0, self.inner) as middle, f.loop(0, self.parts, LANES) as newest:
            place = middle * self.parts + newest
            keys = []
            for old in range(self.parts):
                before = f.load(before_step, I32, (middle + old * self.inner) * 4).splat(LANES)
                keys.append(before + self._cost(f, costs, place + old * self.rest, LANES))
            low = reduce(_lower, keys)
            f.store(low.narrower(I8), oldest, place)
            self._keep(f, low, after_step, place)

    def _cost(self, f: KernelFunction, costs: _Costs, place: Value, lanes: int) -> Value:
        """Return the cost of the numbers from a place on, as part of keys."""
        kind = vector(F32, lanes)
        total = costs.shift.splat(lanes)
        for value, (slope, weight) in enumerate(costs.numbers):
            number = f.item(SearchArgument.NUMBERS, kind, place + (value << self.memory))
            total = _fma(number, _fma(number, weight.splat(lanes), slope.splat(lanes)), total)
        return total.as_type(vector(I32, lanes)) << COST

    def _keep(self, f: KernelFunction, low: Value, keys: Value, place: Value) -> None:
        """Write keys for the next step, from a place on."""
        capped = _lower(low & (-1 << COST), f.constant(low.type, CAP))
        f.store(capped | f.item(SearchArgument.OLDEST, low.type, place), keys, place * 4)

    def _subtract_lowest(self, f: KernelFunction, keys: Value) -> None:
        """Subtract the lowest cost from all keys."""
        lanes = min(LANES, self.rest)
        kind = vector(I32, lanes)
        lowest = f.variable(f.constant(kind, CAP))
        with f.loop(0, self.rest, lanes) as at:
            lowest.set(_lower(lowest.get(), f.load(keys, kind, at * 4)))
        low = lowest.get() & (-1 << COST)
        while low.length > 1:
            half = low.length // 2
            low = _lower(low.shuffle(range(half)), low.shuffle(range(half, 2 * half)))
        base = low.at(0).splat(lanes)
        with f.loop(0, self.rest, lanes) as at:
            f.store(f.load(keys, kind, at * 4) - base, keys, at * 4)

    def _cheapest(self, f: KernelFunction, keys: Value, end: Value) -> Value:
        """Return the last state of a stream without its oldest code: `end`, or the cheapest if that is -1."""
        best, lowest = f.variable(f.constant(I64, 0)), f.variable(f.constant(I32, -1))
        with f.loop(0, self.rest) as at:
            key = f.load(keys, I32, at * 4) & (-1 << COST)
            less = f.builder.icmp_unsigned("<", key.raw, lowest.get().raw)
            best.set(Value(f, f.builder.select(less, at.raw, best.get().raw)))
            lowest.set(Value(f, f.builder.select(less, key.raw, lowest.get().raw)))
        free = f.builder.icmp_signed("<", end.raw, f.constant(I64, 0).raw)
        return Value(f, f.builder.select(free, best.get().raw, (end & (self.rest - 1)).raw))

    def _whole_state(self, f: KernelFunction, oldest: Value, step: Value, rest: Value) -> Value:
        """Return the state after a step, of which `rest` lacks the oldest code."""
        lies = rest if self.bits >= WIDE else (rest & (self.parts - 1)) * self.inner + (rest >> self.bits)
        code = f.load(oldest, I8, step * self.rest + lies).wider(I64, signed=False) & (self.parts - 1)
        return code * self.rest + rest

    def _trace(self, f: KernelFunction, where: tuple[Value, Value, Value], oldest: Value, end: Value) -> Value:
        """Write the states of a column, its numbers and its errors, last step first; return the last state."""
        column, first, steps = where
        place = f.variable(end)
        line = column * f.size(SearchArgument.STEPS)
        with f.loop(0, steps) as back:
            step = steps - 1 - back
            state = self._whole_state(f, oldest, step, place.get())
            place.set(state >> self.bits)
            at = line + first + step
            f.store(state.narrower(I32), f.pointer(SearchArgument.STATES), at * 4)
            for value in range(self.values):
                number = f.item(SearchArgument.TABLE, F32, state + (value << self.memory))
                stored = number * f.item(SearchArgument.FACTORS, F32, (first + step) * self.values + value)
                spot = at * self.values + value
                if self.feeds:
                    wanted = f.item(SearchArgument.CURRENT, F32, spot)
                    error = stored - f.item(SearchArgument.BEFORE, F32, spot) if self.again else wanted - stored
                    f.store(error, f.pointer(SearchArgument.ERRORS), spot * 4)
                f.store(stored, f.pointer(SearchArgument.CURRENT), spot * 4)
        return f.item(SearchArgument.STATES, I32, line + first + steps - 1)

    def _feed(self, f: KernelFunction, column: Value, rows: tuple[Value, Value]) -> None:
        """Move the later columns of the block by a column's errors."""
        first, count = rows
        columns, width = f.size(SearchArgument.COLUMNS), f.size(SearchArgument.STEPS) * self.values
        with f.loop(column + 1, columns) as later:
            share = f.constant(F32, 0.0) - f.item(SearchArgument.SHARES, F32, column * columns + later)

            def move(at: Value, lanes: int) -> None:
                kind = vector(F32, lanes)
                error = f.item(SearchArgument.ERRORS, kind, column * width + first + at)
                spot = later * width + first + at
                f.store(
                    _fma(error, share.splat(lanes), f.item(SearchArgument.CURRENT, kind, spot)),
                    f.pointer(SearchArgument.CURRENT),
                    spot * 4,
                )

            f.each(count, move)


def choose(block: ColumnBlock, numbers: Numbers, states: Tensor, errors: Tensor, streams: range) -> None:
    """Choose some streams of a block; see `choose_columns`."""
    sizes, most = numbers.trellis, longest_stream(block)
    feeds, again = block.shares is not None, block.before is not None
    kernel = ColumnSearch(sizes.bits, sizes.values, sizes.memory, sizes.ring, feeds, again)
    table, oldest = order_numbers(kernel, numbers.table), torch.arange(kernel.rest, device="cpu") // kernel.inner
    edges = torch.tensor([*block.edges, most], dtype=torch.int32, device="cpu")
    room = table.new_empty(len(streams) * kernel.room(most), dtype=torch.uint8)
    tensors = (
        *(block.current, block.before, block.weights, block.factors, block.shares),
        *(table, numbers.table, oldest.int(), edges, block.ends, states, errors, room),
    )
    top = struct.unpack("i", struct.pack("f", numbers.top))[0]
    values = own_values([*map(address_of, tensors), *states.shape, len(block.edges) - 1, streams.start, top])
    launch(load_kernel(kernel), values, len(streams), len(streams) * most * (1 << sizes.memory))


def order_numbers(kernel: ColumnSearch, table: Tensor) -> Tensor:
    """Return numbers `[values, states]` in the kernel's order of reading."""
    if kernel.bits >= WIDE:
        return table
    newest_first = table.reshape(-1, kernel.parts, kernel.inner, kernel.parts).permute(0, 3, 1, 2)
    return newest_first.contiguous()


@dataclass(frozen=True, eq=False)
class _Costs:
    """The terms of a step's costs: (slope, weight) of each value, and the shift of all."""

    numbers: list[tuple[Value, Value]]
    shift: Value


def _fma(number: Value, factor: Value, addend: Value) -> Value:
    """Return `number * factor + addend`, rounded once; by float64 if the processor has no instruction for it."""
    f = number.function
    if f.fused:
        return number.fma(factor, addend)
    double = vector(ir.DoubleType(), number.length)
    wide = [f.builder.fpext(each.raw, double) for each in (number, factor, addend)]
    return Value(f, f.builder.fptrunc(f.builder.fadd(f.builder.fmul(wide[0], wide[1]), wide[2]), number.type))


def _lower(first: Value, second: Value) -> Value:
    return first.function.call("llvm.umin", first.type, first, second, overloads=(first.type,))


def _interleave(parts: Sequence[Value]) -> list[Value]:
    """Return the numbers of vectors, a power of two of them: the first of each, the second of each, and so on."""
    if len(parts) == 1:
        return list(parts)
    even, odd = _interleave(parts[::2]), _interleave(parts[1::2])
    lanes = parts[0].length
    order = [place + lanes * side for place in range(lanes) for side in (0, 1)]
    pairs = zip(even, odd, strict=True)
    return [first.shuffle(order[start : start + lanes], second) for first, second in pairs for start in (0, lanes)]
