"""The kernel for GPUs that chooses the streams of a trellis for a `ColumnBlock`, and its launch.

A program carries one stream through all columns of a block: its search, the way back, and its errors, which later
columns lose. A thread owns some butterflies: 2^bits costs before a step, 2^bits costs after it, and their numbers,
which stay in registers. Costs change threads once a step. Every `CHUNK` steps each path's state is written, so that the
way back goes through all chunks at once. Sums and products are fused by `tl.fma` alone (`enable_fp_fusion=False`).
Only programs that search import this file: Triton comes with torch for GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress.kernels import column_block
from llmcompress.kernels.column_block import ColumnBlock, Numbers, longest_stream
from llmcompress.kernels.gpu.trace_triton import HIGH, last_place, oldest_code, record_codes, trace, trace_chunks
from llmcompress.weight.trellis import Trellis

CHECKED = 12  # bits of a state up to which the states at the ends of chunks fit a key
STEPS = 64  # of a chunk
REGISTERS = 4  # bits of a code up to which costs change threads without memory


COST = tl.constexpr(column_block.COST)
CAP = tl.constexpr(column_block.CAP)
WHOLE = tl.constexpr(column_block.WHOLE)
WIDEST = tl.constexpr(column_block.WIDEST)
SEAM = tl.constexpr(column_block.SEAM)


def choose(block: ColumnBlock, numbers: Numbers, states: Tensor, errors: Tensor, streams: range) -> None:
    """Choose some streams of a block; see `choose_columns`."""
    device, most = block.current.device, longest_stream(block)
    sizes = constants(numbers.trellis, most, block.shares is not None, block.before is not None)
    rest = 1 << (numbers.trellis.memory - numbers.trellis.bits)
    edges = _edges_on(device, block.edges)
    kind, per_step = stored_codes(numbers.trellis)

    def room(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(max(1, len(streams) * count), dtype=dtype, device=device)

    rooms = (
        room(most * (numbers.trellis.values + 1), torch.float32),
        room(most * per_step, kind),
        room(most // STEPS * rest, torch.int16),
        room(2 * rest, torch.int32),
    )
    absent = block.current  # in the place of missing tensors
    tensors = (block.current, absent if block.before is None else block.before, block.weights, block.factors)
    shares = absent if block.shares is None else block.shares
    with torch.cuda.device_of(block.current):
        column_search[(len(streams),)](
            *tensors, shares, numbers.table, edges, block.ends, states, errors, *rooms,
            block.current.shape[1], len(block.current), streams.start, len(block.edges) - 1, numbers.top,
            **sizes, **launch_options(numbers.trellis),
        )  # fmt: skip


@lru_cache(maxsize=64)
def _edges_on(device: torch.device, edges: tuple[int, ...]) -> Tensor:
    return torch.tensor(edges, dtype=torch.int32, device=device)  # which waits for the device


def constants(trellis: Trellis, most: int, feeds: bool, again: bool) -> dict[str, Any]:
    """Return the constants that the kernel is compiled for; `most`: the steps of the longest stream."""
    return {
        "BITS": trellis.bits,
        "VALUES": trellis.values,
        "MEMORY": trellis.memory,
        "RING": trellis.ring,
        "MOST": most,
        "CHUNK": STEPS,
        "EVERY": column_block.EVERY,
        "LANES": triton.next_power_of_2(-(-most // STEPS)),
        "BLOCK": 256,
        "FEEDS": feeds,
        "AGAIN": again,
        "ORIGINS": trellis.memory <= CHECKED,
        "IN_REGISTERS": trellis.bits <= REGISTERS,
    }


def launch_options(trellis: Trellis) -> dict[str, Any]:
    """Return the options of the compiler: fused products by `tl.fma` alone, and 4,096 numbers or 1,024 threads."""
    threads = min(1 << (trellis.memory - 4), 1 << (trellis.memory - trellis.bits), 1024)
    options: dict[str, Any] = {"num_warps": max(1, threads // 32), "num_stages": 1, "enable_fp_fusion": False}
    return options | ({"maxnreg": 64} if threads == 1024 else {})  # all that a thread can have; the default is 32


def stored_codes(trellis: Trellis) -> tuple[torch.dtype, int]:
    """Return the storage of oldest codes for the way back: the type of a number, and the numbers of a step."""
    if trellis.bits > 3:
        return torch.uint8, 1 << (trellis.memory - trellis.bits)
    return torch.int32 if trellis.bits == 3 else torch.int8, 1 << (trellis.memory - 2 * trellis.bits)


# --- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def column_search(
    current, before, weights, factors, shares, numbers, edges, ends, states, errors, terms, oldest, origins, keys,
    rows, columns, start, streams, top,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, RING: tl.constexpr, MOST: tl.constexpr,
    CHUNK: tl.constexpr, EVERY: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, FEEDS: tl.constexpr,
    AGAIN: tl.constexpr, ORIGINS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Choose the columns of one stream. `terms` float32, `oldest`, `origins` int16 and `keys`
    int32 are for the kernel's own use; the others as in `ColumnBlock`, `numbers` `[values, states]`."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    PER_STEP: tl.constexpr = (1 << (MEMORY - 2 * BITS)) if BITS <= 3 else REST
    program = tl.program_id(0)
    stream = start + program
    first = tl.load(edges + stream)
    steps = tl.load(edges + stream + 1) - first
    number = _numbers_of(numbers, BITS, VALUES, MEMORY)
    terms += program * (MOST * (VALUES + 1))
    oldest += program.to(tl.int64) * (MOST * PER_STEP)
    origins += program.to(tl.int64) * (MOST // CHUNK * REST)
    keys += program * (2 * REST)
    current += first * VALUES
    before += first * VALUES
    errors += first * VALUES
    weights += first * VALUES
    factors += first * VALUES
    for column in range(columns):
        wanted = current + column * rows
        sizes = (steps, rows, column, columns)
        _prepare(wanted, errors, shares + column, weights, factors, terms, sizes, top, VALUES, MOST, BLOCK, FEEDS)
        tl.debug_barrier()
        if RING:
            entry = _find_seam(
                number, keys, terms, weights, oldest, origins, steps,
                BITS, VALUES, MEMORY, MOST, CHUNK, EVERY, ORIGINS, IN_REGISTERS,
            )  # fmt: skip
            end = entry
            tl.debug_barrier()
        else:
            entry = tl.load(ends + column * streams + stream)
            end = tl.load(ends + (column + 1) * streams + stream)
        key = _advance(
            entry, number, keys, terms, weights, oldest, origins, steps, 0, steps,
            BITS, VALUES, MEMORY, MOST, CHUNK, EVERY, ORIGINS, IN_REGISTERS, False,
        )  # fmt: skip
        place, origin = last_place(key, end, REST)
        tl.debug_barrier()
        path = states + column * (rows // VALUES) + first
        if ORIGINS:
            trace_chunks(path, oldest, origins, steps, place, origin, BITS, MEMORY, CHUNK, LANES)
        else:
            trace(path, oldest, steps, place, BITS, MEMORY)
        tl.debug_barrier()
        tl.store(ends + (column + 1) * streams + stream, tl.load(path + steps - 1))
        again = before + column * rows
        _settle(
            wanted, again, factors, numbers, path, errors + column * rows, steps, VALUES, MEMORY, BLOCK, FEEDS, AGAIN
        )
        tl.debug_barrier()


@triton.jit
def _find_seam(
    number, keys, terms, weights, oldest, origins, steps,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr,
    EVERY: tl.constexpr, ORIGINS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Return the state between the end of a ring and its start, without its oldest code."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    side = tl.minimum(steps // 2, SEAM // VALUES)
    key = _advance(
        -1, number, keys, terms, weights, oldest, origins, steps, steps - side, 2 * side,
        BITS, VALUES, MEMORY, MOST, CHUNK, EVERY, ORIGINS, IN_REGISTERS, True,
    )  # fmt: skip
    place, _ = last_place(key, -1, REST)
    tl.debug_barrier()
    if ORIGINS and side == CHUNK:
        place = tl.load(origins + REST + place).to(tl.int32) & (REST - 1)
    else:
        for back in range(side):
            step = 2 * side - 1 - back
            state = (oldest_code(oldest, step, place, step >= 0, BITS, MEMORY) << (MEMORY - BITS)) + place
            place = state >> BITS
    return place


@triton.jit
def _advance(
    entry, number, keys, terms, weights, oldest, origins, steps, begin, count,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr,
    EVERY: tl.constexpr, ORIGINS: tl.constexpr, IN_REGISTERS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Take `count` steps of a column from `begin` on, with `ROUND` beyond the last one those of the start. They begin
    in the state `entry`, or in any if that is -1. Return the keys after the last one."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    PER_STEP: tl.constexpr = (1 << (MEMORY - 2 * BITS)) if BITS <= 3 else REST
    rest = tl.arange(0, REST)
    low_bits: tl.constexpr = (REST - 1) if ORIGINS else 0
    reached = (rest == entry % REST) | (entry < 0)
    key = tl.where(reached, 0, CAP).to(tl.uint32) | (rest & low_bits).to(tl.uint32)
    shift, slope, weight, slope2, weight2 = _load_terms(terms, weights, begin, VALUES, MOST)
    for step in range(count):
        following = begin + tl.minimum(step + 1, count - 1)  # loads take as long as a step
        if ROUND:
            following = tl.where(following < steps, following, following - steps)
        ahead = _load_terms(terms, weights, following, VALUES, MOST)
        costs = (shift, slope, weight, slope2, weight2)
        low = _lowest(key, keys + step % 2 * REST, number, costs, BITS, VALUES, MEMORY, ORIGINS, IN_REGISTERS)
        shift, slope, weight, slope2, weight2 = ahead
        record_codes(low, oldest + step * PER_STEP, BITS, MEMORY, ORIGINS)
        key = tl.reshape(low, (REST,))
        key = tl.minimum(key & HIGH, CAP) | (key & low_bits)
        if step % EVERY == EVERY - 1:
            key -= tl.min(key, 0) & HIGH
        if ORIGINS and step % CHUNK == CHUNK - 1:
            tl.store(origins + step // CHUNK * REST + rest, (key & (REST - 1)).to(tl.int16))
            key = (key & HIGH) | rest.to(tl.uint32)
    return key


@triton.jit
def _settle(
    current, before, factors, numbers, states, errors, steps,
    VALUES: tl.constexpr, MEMORY: tl.constexpr, BLOCK: tl.constexpr, FEEDS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Replace the wanted numbers by the stored ones, and write the errors."""
    for begin in range(0, steps * VALUES, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        here = row < steps * VALUES
        state = tl.load(states + row // VALUES, mask=here, other=0)
        stored = tl.load(numbers + (row % VALUES << MEMORY) + state, mask=here, other=0.0).to(tl.float32)
        stored *= tl.load(factors + row, mask=here, other=0.0)
        if FEEDS:
            if AGAIN:
                error = stored - tl.load(before + row, mask=here, other=0.0)
            else:
                error = tl.load(current + row, mask=here, other=0.0) - stored
            tl.store(errors + row, error, mask=here)
        tl.store(current + row, stored, mask=here)


@triton.jit
def _numbers_of(numbers, BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr):
    """Return the numbers of a thread's states, `[butterflies, newest code]` for each oldest code and value."""
    PARTS: tl.constexpr = 1 << BITS
    inner = tl.arange(0, 1 << (MEMORY - 2 * BITS))
    newest = tl.arange(0, PARTS)
    found = ()
    for old in tl.static_range(PARTS):
        for value in tl.static_range(VALUES):
            at = (value << MEMORY) + (old << (MEMORY - BITS)) + inner[:, None] * PARTS + newest[None, :]
            found = found + (tl.load(numbers + at),)
    return found


@triton.jit
def _prepare(
    wanted, errors, shares, weights, factors, terms, sizes, top, VALUES: tl.constexpr, MOST: tl.constexpr,
    BLOCK: tl.constexpr, FEEDS: tl.constexpr,
):  # fmt: skip
    """Subtract earlier errors from a column, and write the terms of costs, `weight x^2 + slope x + shift`: slopes and
    shifts."""
    steps, rows, column, columns = sizes
    for begin in range(0, steps, BLOCK):
        step = begin + tl.arange(0, BLOCK)
        here = step < steps
        shift = tl.zeros((BLOCK,), tl.float32)
        for value in tl.static_range(VALUES):
            row = step * VALUES + value
            x = tl.load(wanted + row, mask=here, other=0.0)
            if FEEDS:
                for earlier in tl.range(0, column, loop_unroll_factor=8):
                    error = tl.load(errors + earlier * rows + row, mask=here, other=0.0)
                    x = tl.fma(error, 0.0 - tl.load(shares + earlier * columns), x)
                tl.store(wanted + row, x, mask=here)
            factor = tl.load(factors + row, mask=here, other=1.0)
            x = tl.where(factor > 0, tl.div_rn(x, tl.where(factor > 0, factor, 1.0)), 0.0)
            x = tl.minimum(tl.maximum(x, -WIDEST), WIDEST)
            weight = tl.load(weights + row, mask=here, other=0.0)
            over = tl.maximum(tl.abs(x) - top, 0.0)
            tl.store(terms + value * MOST + step, x * weight * -2.0, mask=here)
            part = (x * x - over * over) * weight
            if value == 0:
                shift = part
            else:
                shift += part
        tl.store(terms + VALUES * MOST + step, shift + WHOLE, mask=here)


@triton.jit
def _load_terms(terms, weights, step, VALUES: tl.constexpr, MOST: tl.constexpr):
    """Return the terms of a step's costs: shift, slope and weight, and those of a second value."""
    second: tl.constexpr = VALUES - 1
    slope, weight = tl.load(terms + step), tl.load(weights + step * VALUES)
    slope2, weight2 = tl.load(terms + second * MOST + step), tl.load(weights + step * VALUES + second)
    return tl.load(terms + VALUES * MOST + step), slope, weight, slope2, weight2


@triton.jit
def _lowest(
    key, exchange, number, costs, BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr,
    ORIGINS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Return the lowest keys after a step, `[butterflies, newest code]`, with their oldest codes."""
    PARTS: tl.constexpr = 1 << BITS
    J: tl.constexpr = 1 << (MEMORY - 2 * BITS)
    CODE: tl.constexpr = (MEMORY - BITS) if ORIGINS else 0
    shift, slope, weight, slope2, weight2 = costs
    if IN_REGISTERS:
        parts = _parts(key, BITS, J)
    else:
        tl.store(exchange + tl.arange(0, PARTS * J), key.to(tl.int32, bitcast=True))
        tl.debug_barrier()
    low = tl.full((J, PARTS), 0xFFFFFFFF, tl.uint32)
    for old in tl.static_range(PARTS):
        if IN_REGISTERS:
            reached = parts[old]
        else:
            reached = tl.load(exchange + old * J + tl.arange(0, J)).to(tl.uint32, bitcast=True)
        x = number[old * VALUES].to(tl.float32)
        cost = tl.fma(x, tl.fma(x, weight, slope), shift)
        if VALUES == 2:
            x = number[old * VALUES + 1].to(tl.float32)
            cost = tl.fma(x, tl.fma(x, weight2, slope2), cost)
        after = (reached | (old << CODE))[:, None] + (cost.to(tl.uint32, bitcast=True) << COST)
        low = tl.minimum(low, after)
    return low


@triton.jit
def _parts(flat, BITS: tl.constexpr, J: tl.constexpr):
    """Return the 2^BITS runs of J of `flat`; BITS up to 4."""
    if BITS == 1:
        parts = tl.split(tl.permute(tl.reshape(flat, (2, J)), (1, 0)))
    elif BITS == 2:
        a, b = tl.split(tl.permute(tl.reshape(flat, (2, 2, J)), (2, 1, 0)))
        parts = tl.split(a) + tl.split(b)
    elif BITS == 3:
        a, b = tl.split(tl.permute(tl.reshape(flat, (2, 2, 2, J)), (3, 2, 1, 0)))
        parts = _quarters(a) + _quarters(b)
    else:
        a, b = tl.split(tl.permute(tl.reshape(flat, (2, 2, 2, 2, J)), (4, 3, 2, 1, 0)))
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        parts = _quarters(a0) + _quarters(a1) + _quarters(b0) + _quarters(b1)
    return parts


@triton.jit
def _quarters(x):
    a, b = tl.split(x)
    return tl.split(a) + tl.split(b)
