"""The product of a few tokens with streams of a trellis, and a low-rank term, by Triton.

A program takes a unit, 32 steps of every column: a thread reads the words of a column and decodes all steps from
registers, since the first bit of each step's state is known when the kernel is compiled. So nothing is decoded twice,
and columns are summed once, at the end, in one order. Several tokens: the decoded unit is multiplied by tensor cores,
16 tokens at a time. The launches also work under Triton's interpreter on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress.kernels.gpu.grid_triton import TILE, LowRankInputs, low_rank_sums, rank_constants, rank_of
from llmcompress.kernels.gpu.layouts import StreamRows

MOST_SHARED = 14  # bits of a state: numbers of so many states are looked up in shared memory
BLOCKS = 4  # of columns that a program decodes


def launch_streams(
    x: Tensor,
    rows: StreamRows,
    low_rank: LowRankInputs | None,
    onto: Tensor | None,
    dtype: torch.dtype,
    changed: Mapping[str, int] | None = None,
) -> Tensor:
    """Return the product `[tokens, out]` of `x` `[tokens, in]` in a dtype; `onto` float32 `[tokens, out]` is added.

    `changed`: other constants of the kernel, for measurements.
    """
    out, tokens = rows.size[0], len(x)
    y = torch.empty(tokens, out, dtype=dtype, device=x.device)
    if tokens == 0:
        return y
    constants = stream_constants(rows, rank_of(low_rank), onto is not None, tokens) | dict(changed or {})
    absent = rows.scale  # in the place of missing tensors, which the constants exclude
    factors = (absent,) * 2 if low_rank is None else (low_rank.left, low_rank.low)
    tensors = (x, rows.words, rows.units, rows.scale, rows.numbers, factors, absent if onto is None else onto, y)
    with torch.cuda.device_of(x):
        programs = (len(rows.units), triton.cdiv(tokens, constants["TOKENS"]))
        stream_product[programs](*tensors, tokens, out, **constants)
    return y


def stream_constants(rows: StreamRows, rank: int, onto: bool, tokens: int) -> dict[str, Any]:
    """Return the constants that the kernel is compiled for, and its number of warps."""
    single = tokens == 1
    threads = 4 if rows.size[1] < 4096 else 8
    columns = triton.next_power_of_2(max(rows.size[1], 16))
    return {
        "width": rows.size[1],
        "BITS": rows.bits,
        "VALUES": rows.values,
        "MEMORY": rows.memory,
        "SHARED": rows.memory <= MOST_SHARED,
        **rank_constants(rank),
        "ONTO": onto,
        "TOKENS": 1 if single else TILE,
        "STAGES": 4,  # columns on their way from memory while others are decoded
        "COLUMNS": min(columns, 32 * threads if single else 128),
        "num_warps": threads if single else 4,
    }


def decode_streams(rows: StreamRows, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]` of streams in a dtype."""
    y = torch.empty(rows.size, dtype=dtype, device=rows.scale.device)
    constants = stream_constants(rows, 0, False, TILE)
    names = ("width", "BITS", "VALUES", "MEMORY", "SHARED", "COLUMNS", "STAGES", "num_warps")
    sizes = {name: constants[name] for name in names}
    programs = (len(rows.units), triton.cdiv(rows.size[1], constants["COLUMNS"] * BLOCKS))
    with torch.cuda.device_of(y):
        stream_matrix[programs](rows.words, rows.units, rows.scale, rows.numbers, y, **sizes, BLOCKS=BLOCKS)
    return y


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def stream_bits(words, STEP: tl.constexpr, BITS: tl.constexpr, MEMORY: tl.constexpr):
    """Return bits of a unit that end with a step's code: the state of the step, below earlier bits."""
    WORD: tl.constexpr = (STEP * BITS + BITS - 1) // 32 + 1  # that holds the newest bit; words[0] is of the unit before
    SHIFT: tl.constexpr = WORD * 32 - (STEP + 1) * BITS
    found = words[WORD] >> SHIFT
    if SHIFT + MEMORY > 32:
        found |= words[WORD - 1] << (32 - SHIFT)
    return found


@triton.jit
def unit_numbers(
    words, numbers, held, VALUE: tl.constexpr, COLUMNS: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Return one of the numbers of each step of a unit, float32 `[columns, 32]`.

    They are looked up in `held`, the numbers of all states in shared memory, or in `numbers` in memory. Joining steps
    moves nothing; it only names them.
    """
    steps = ()
    for step in tl.static_range(32):
        steps = steps + ((stream_bits(words, step, BITS, MEMORY) & ((1 << MEMORY) - 1)).to(tl.int32),)
    for level in tl.static_range(5):  # steps 16 apart first, so that the last index is the lowest bit of the step
        joined = ()
        for place in tl.static_range(16 >> level):
            joined = joined + (tl.join(steps[place], steps[place + (16 >> level)]),)
        steps = joined
    states = tl.reshape(steps[0], (COLUMNS * 32,))
    unit = tl.gather(held, states, 0) if SHARED else tl.load(numbers + states * VALUES + VALUE)
    return tl.reshape(unit, (COLUMNS, 32)).to(tl.float32)


@triton.jit
def unit_rows(
    top, column, known, numbers, first_numbers, second_numbers, width: tl.constexpr, COLUMNS: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Return the rows of a unit in some columns, float32 `[columns, 32 VALUES]`, without their scales."""
    held = ()
    for word in tl.static_range(BITS + 1):
        loaded = tl.load(top + word * width + column, mask=known, other=0)
        held = held + (loaded.to(tl.uint32, bitcast=True),)
    found = unit_numbers(held, numbers, first_numbers, 0, COLUMNS, BITS, VALUES, MEMORY, SHARED)
    if VALUES == 2:
        other = unit_numbers(held, numbers, second_numbers, 1, COLUMNS, BITS, VALUES, MEMORY, SHARED)
        found = tl.reshape(tl.join(found, other), (COLUMNS, 64))
    return found


@triton.jit
def shared_numbers(numbers, VALUE: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, SHARED: tl.constexpr):
    """Return the numbers of all states if threads exchange them, else their address."""
    found = numbers
    if SHARED and VALUE < VALUES:
        found = tl.load(numbers + tl.arange(0, 1 << MEMORY) * VALUES + VALUE)
    return found


@triton.jit
def stream_matrix(
    words, units, scale, numbers, y, width: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
    MEMORY: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write a unit of the matrix `y` `[out, in]`, in `BLOCKS` blocks of columns."""
    ROWS: tl.constexpr = 32 * VALUES
    unit = units + tl.program_id(0) * 3
    top = words + (tl.load(unit) - 1).to(tl.int64) * width
    first_numbers = shared_numbers(numbers, 0, VALUES, MEMORY, SHARED)
    second_numbers = shared_numbers(numbers, 1, VALUES, MEMORY, SHARED)
    inside = tl.arange(0, ROWS)
    row = tl.load(unit + 1) + inside
    here = inside < tl.load(unit + 2)
    factor = tl.load(scale + row, mask=here, other=0)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        column = (tl.program_id(1) * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS)
        known = column < width
        weights = unit_rows(
            top, column, known, numbers, first_numbers, second_numbers, width, COLUMNS, BITS, VALUES, MEMORY, SHARED
        )  # fmt: skip
        weights = (weights * factor[None, :]).to(y.dtype.element_ty)
        tl.store(y + row.to(tl.int64)[None, :] * width + column[:, None], weights, mask=known[:, None] & here[None, :])


@triton.jit(do_not_specialize=["tokens"])
def stream_product(
    x, words, units, scale, numbers, low_rank, onto, y,
    tokens, out, width: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, SHARED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ONTO: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write `y` `[tokens, out]`: the product of `x` `[tokens, in]` with a unit, see `layouts`.

    `low_rank` is (left, low); `onto` float32 `[tokens, out]` is added. `TOKENS` is 1, or those of a program.
    """
    ROWS: tl.constexpr = 32 * VALUES
    unit = units + tl.program_id(0) * 3
    top = words + (tl.load(unit) - 1).to(tl.int64) * width
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    total = tl.zeros((COLUMNS if TOKENS == 1 else TOKENS, ROWS), tl.float32)
    first_numbers = shared_numbers(numbers, 0, VALUES, MEMORY, SHARED)
    second_numbers = shared_numbers(numbers, 1, VALUES, MEMORY, SHARED)
    for begin in tl.range(0, width, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        known = column < width
        weights = unit_rows(
            top, column, known, numbers, first_numbers, second_numbers, width, COLUMNS, BITS, VALUES, MEMORY, SHARED
        )  # fmt: skip
        if TOKENS == 1:
            total += weights * tl.load(x + first * width + column, mask=known, other=0).to(tl.float32)[:, None]
        else:
            place = x + token[:, None] * width + column[None, :]
            given = tl.load(place, mask=(token < tokens)[:, None] & known[None, :], other=0)
            total = tl.dot(given, weights.to(given.dtype), total, input_precision="ieee")
    sums = tl.sum(total, 0)[None, :] if TOKENS == 1 else total
    inside = tl.arange(0, ROWS)
    row = tl.load(unit + 1) + inside
    here = inside < tl.load(unit + 2)
    sums *= tl.load(scale + row, mask=here, other=0)[None, :]
    if RANK:
        for each in range(TOKENS):
            if first + each < tokens:
                more = low_rank_sums(low_rank[0], low_rank[1] + (first + each) * RANK, row, here, RANK, RANK_BLOCK)
                sums += tl.where(tl.arange(0, TOKENS)[:, None] == each, more[None, :], 0.0)
    place = token[:, None] * out + row[None, :]
    there = (token < tokens)[:, None] & here[None, :]
    if ONTO:
        sums += tl.load(onto + place, mask=there, other=0)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=there)
