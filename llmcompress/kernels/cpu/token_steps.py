"""Kernels of what surrounds the linears of a decoder block at one token.

Hidden states, weights of norms, and the cache are bfloat16; every result is rounded where transformers rounds it. Sums
have an order of their own, and attention rounds only its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto

from llmcompress.kernels.cpu.calls import OWN, KernelFunction
from llmcompress.kernels.cpu.emit import F32, FLOATS, I64, LANES, Value, Variable, vector
from llmcompress.kernels.cpu.quantize_inputs import fold
from llmcompress.kernels.cpu.vectors import exponential, from_bfloat16, round_short

LEAST = -1e30  # a score that counts for nothing
AT_ONCE = 16  # vectors of outputs that attention sums up side by side

Pieces = list[tuple[int, Value]]  # (place, numbers) of a vector in parts


class NormArgument(IntEnum):
    """The place of an argument; tensors are bfloat16 `[width]`."""

    HIDDEN = OWN
    MORE = auto()  # added to the hidden states, if any
    SUM = auto()  # what that gives
    WEIGHT = auto()
    X = auto()  # the result


@dataclass(frozen=True)
class Norm:
    """The RMS norm of hidden states, or of the sum with `MORE` if it is an `addition`, which is written too.

    `shifted`: weights are stored less 1, and what they multiply is not rounded before, as in Gemma.
    """

    width: int
    epsilon: float
    shifted: bool
    addition: bool

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for one block."""
        hidden, more, total, weight, x = map(f.pointer, NormArgument)
        width, source = f.constant(I64, self.width), total if self.addition else hidden
        squares, rest = f.variable(f.constant(FLOATS, 0.0)), f.variable(f.constant(vector(F32, 1), 0.0))

        def add(place: Value, lanes: int) -> None:
            value = f.load_bfloat16(hidden, lanes, place)
            if self.addition:
                value = round_short(value + f.load_bfloat16(more, lanes, place))
                f.store(value.to_bfloat16(), total, place * 2)
            squared = squares if lanes == LANES else rest
            squared.set(value.fma(value, squared.get()))

        with f.loop(f.first, f.last):
            f.each(width, add)
            size = root_of_mean(f, fold(squares.get(), Value.__add__) + rest.get().at(0), self.width, self.epsilon)

            def scale(place: Value, lanes: int) -> None:
                normal = f.load_bfloat16(source, lanes, place).over(size.splat(lanes))
                f.store(weigh(normal, f.load_bfloat16(weight, lanes, place), self.shifted), x, place * 2)

            f.each(width, scale)


class AttendArgument(IntEnum):
    """The place of an argument; tensors are bfloat16 unless they say otherwise."""

    QUERIES = OWN  # [heads * group, size]
    KEY = auto()  # [heads, size]
    VALUE = auto()  # alike
    QUERY_BIAS = auto()  # alike, or nothing, as the next two
    KEY_BIAS = auto()
    VALUE_BIAS = auto()
    QUERY_NORM = auto()  # [size], or nothing, as the next one
    KEY_NORM = auto()
    COSINES = auto()  # [size]
    SINES = auto()
    KEYS = auto()  # [heads, stride / size, size], with room for the key behind the first `COUNT`
    VALUES = auto()  # alike
    STRIDE = auto()  # numbers between heads in these
    COUNT = auto()
    SCORES = auto()  # float32 [heads, ROOM], written to
    ROOM = auto()  # at least `scores_room`
    MIXED = auto()  # [heads * group, size], the result


@dataclass(frozen=True)
class Attend:
    """Attention of one token: rotated queries to rotated keys, this token's with its value among them.

    A block is a head of keys, which `group` heads of queries of `size` numbers read. `norm`: the epsilon of the norms
    of queries and keys; None for none. `shifted`: as of `Norm`.
    """

    size: int
    group: int
    scaling: float
    bias: bool
    norm: float | None
    shifted: bool = False

    def scores_room(self, count: int) -> int:
        """Return the numbers in `SCORES` that a head needs for so many keys: its queries, then their scores."""
        return self.group * (self.size + -(-count // LANES) * LANES)

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of heads."""
        count = f.size(AttendArgument.COUNT)
        keys_now = count + 1
        row = keys_now + (LANES - 1) - (keys_now + (LANES - 1) & (LANES - 1))  # of scores
        with f.loop(f.first, f.last) as head:
            queries = f.behind(f.pointer(AttendArgument.SCORES), head * f.size(AttendArgument.ROOM) * 4)
            scores = f.behind(queries, self.group * self.size * 4)
            start = head * f.size(AttendArgument.STRIDE) * 2
            keys = f.behind(f.pointer(AttendArgument.KEYS), start)
            values = f.behind(f.pointer(AttendArgument.VALUES), start)
            self._take_token(f, head, queries, (keys, values), count)
            tops = self._score(f, queries, keys, scores, row, keys_now)
            sums = [self._exponentiate(f, f.behind(scores, row * (4 * q)), row, top) for q, top in enumerate(tops)]
            together = max(1, AT_ONCE * LANES // self.size)
            for first in range(0, self.group, together):
                self._mix(f, head, range(first, min(first + together, self.group)), (scores, row), sums, values)

    def _take_token(
        self, f: KernelFunction, head: Value, queries: Value, cache: tuple[Value, Value], count: Value
    ) -> None:
        """Write the token's key and value to the cache, and its queries, times the scaling, to float32."""
        behind = count * self.size
        for place, part in self._rotate(f, AttendArgument.KEY, head):
            f.store(part.to_bfloat16(), cache[0], (behind + place) * 2)
        for place, part in self._read(f, AttendArgument.VALUE, head):
            f.store(part.to_bfloat16(), cache[1], (behind + place) * 2)
        for q in range(self.group):
            for place, part in self._rotate(f, AttendArgument.QUERIES, head * self.group + q):
                f.store(part * self.scaling, queries, (q * self.size + place) * 4)

    def _read(self, f: KernelFunction, what: AttendArgument, head: Value) -> Pieces:
        """Return a head of the token with its bias."""
        source, bias = f.pointer(what), f.pointer(AttendArgument(what + 3))
        start = head * self.size
        pieces = [(at, f.load_bfloat16(source, lanes, start + at)) for at, lanes in pieces_of(self.size)]
        if self.bias:
            pieces = [(at, round_short(part + f.load_bfloat16(bias, part.length, start + at))) for at, part in pieces]
        return pieces

    def _rotate(self, f: KernelFunction, what: AttendArgument, head: Value) -> Pieces:
        """Return a head of the token with its bias, its norm and its rotation."""
        pieces = self._read(f, what, head)
        if self.norm is not None:
            weight = f.pointer(AttendArgument(what + 6))
            total = add_up([part * part for _, part in pieces])
            size = root_of_mean(f, total, self.size, self.norm)
            normals = [(at, part.over(size.splat(part.length))) for at, part in pieces]
            weights = [f.load_bfloat16(weight, part.length, at) for at, part in normals]
            pieces = [
                (at, from_bfloat16(weigh(part, own, self.shifted)))
                for (at, part), own in zip(normals, weights, strict=True)
            ]
        half = len(pieces) // 2
        cosines, sines = f.pointer(AttendArgument.COSINES), f.pointer(AttendArgument.SINES)
        turned: Pieces = []
        for number, (at, part) in enumerate(pieces):
            other = pieces[(number + half) % len(pieces)][1]
            other = f.constant(other.type, 0.0) - other if number < half else other
            straight = round_short(part * f.load_bfloat16(cosines, part.length, at))
            turned.append((at, round_short(straight + round_short(other * f.load_bfloat16(sines, part.length, at)))))
        return turned

    def _score(
        self, f: KernelFunction, queries: Value, keys: Value, scores: Value, row: Value, count: Value
    ) -> list[Value]:
        """Write the scores of all keys; return the largest of each query."""
        for q in range(self.group):  # behind the last key
            f.store(f.constant(FLOATS, LEAST), scores, (row * (q + 1) - LANES) * 4)
        tops = [f.variable(f.constant(F32, LEAST)) for _ in range(self.group)]
        with f.loop(0, count) as key:
            parts = [(at, f.load_bfloat16(keys, lanes, key * self.size + at)) for at, lanes in pieces_of(self.size)]
            for q, top in enumerate(tops):
                own = [f.load(queries, part.type, (q * self.size + at) * 4) for at, part in parts]
                score = multiply_and_add([(part, other) for (_, part), other in zip(parts, own, strict=True)])
                f.store(score, scores, (row * q + key) * 4)
                top.set(top.get().larger(score))
        return [top.get() for top in tops]

    def _exponentiate(self, f: KernelFunction, scores: Value, row: Value, top: Value) -> Value:
        """Turn the scores of a query into exponentials; return their sum."""
        total, most = f.variable(f.constant(FLOATS, 0.0)), top.splat(LANES)
        with f.loop(0, row, LANES) as place:
            share = exponential(f.load(scores, FLOATS, place * 4) - most)
            f.store(share, scores, place * 4)
            total.set(total.get() + share)
        return fold(total.get(), Value.__add__)

    def _mix(
        self,
        f: KernelFunction,
        head: Value,
        own: range,
        shares: tuple[Value, Value],
        sums: list[Value],
        values: Value,
    ) -> None:
        """Write the outputs of a few queries; `shares`: the address of all, and the numbers of one query."""
        scores, row = shares
        layout = pieces_of(self.size)
        totals: list[list[Variable]] = [
            [f.variable(f.constant(vector(F32, lanes), 0.0)) for _, lanes in layout] for _ in own
        ]
        with f.loop(0, f.size(AttendArgument.COUNT) + 1) as key:
            parts = [f.load_bfloat16(values, lanes, key * self.size + at) for at, lanes in layout]
            for q, sums_of_query in zip(own, totals, strict=True):
                share = f.load(scores, F32, (row * q + key) * 4)
                for total, part in zip(sums_of_query, parts, strict=True):
                    total.set(part.fma(share.splat(part.length), total.get()))
        mixed = f.pointer(AttendArgument.MIXED)
        for q, sums_of_query in zip(own, totals, strict=True):
            start = (head * self.group + q) * self.size
            for (at, lanes), total in zip(layout, sums_of_query, strict=True):
                f.store(total.get().over(sums[q].splat(lanes)).to_bfloat16(), mixed, (start + at) * 2)


def weigh(normal: Value, weight: Value, shifted: bool) -> Value:
    """Return numbers of a norm times its weights, as bfloat16; `shifted`: as of `Norm`."""
    return (normal * (weight + 1.0) if shifted else round_short(normal) * weight).to_bfloat16()


def root_of_mean(f: KernelFunction, total: Value, count: int, epsilon: float) -> Value:
    """Return the root of the mean of `count` numbers whose sum is `total`, and of `epsilon`."""
    return f.call("llvm.sqrt", F32, total * (1 / count) + epsilon, overloads=(F32,))


def pieces_of(size: int) -> list[tuple[int, int]]:
    """Return (place, lanes) of the vectors that `size` numbers are read in, those of both halves alike."""
    half, pieces = size // 2, list[tuple[int, int]]()
    lanes, place = LANES, 0
    while place < half:
        while place + lanes > half:
            lanes //= 2
        pieces.append((place, lanes))
        place += lanes
    return [*pieces, *((half + at, lanes) for at, lanes in pieces)]


def add_up(parts: list[Value]) -> Value:
    """Return the sum of all numbers in vectors, those of a length together."""
    return _add_lengths(parts, lambda part, total: part if total is None else total + part)


def multiply_and_add(pairs: list[tuple[Value, Value]]) -> Value:
    """Return the sum of the products of numbers in pairs of vectors."""
    others = {id(part): other for part, other in pairs}

    def add(part: Value, total: Value | None) -> Value:
        other = others[id(part)]
        return part * other if total is None else part.fma(other, total)

    return _add_lengths([part for part, _ in pairs], add)


def _add_lengths(parts: list[Value], add: Callable[[Value, Value | None], Value]) -> Value:
    totals: dict[int, Value] = {}
    for part in parts:
        totals[part.length] = add(part, totals.get(part.length))
    sums = [fold(total, Value.__add__) for total in totals.values()]
    for more in sums[1:]:
        sums[0] = sums[0] + more
    return sums[0]
