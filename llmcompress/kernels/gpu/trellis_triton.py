"""The product of a few tokens with streams of a trellis, and a low-rank term, by Triton.

A program takes a unit, 32 steps of every column: a thread reads the words of a column and decodes all steps from
registers, since where each step's state begins is known when the kernel is compiled. So nothing is decoded twice, and
sums over columns are taken once, at the end, in one order. More tokens than one: the decoded unit is multiplied by
tensor cores, 16 tokens at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmcompress.kernels.gpu.grid_triton import low_rank_sums


@triton.jit
def stream_bits(words, STEP: tl.constexpr, BITS: tl.constexpr, MEMORY: tl.constexpr):
    """Return the bits of a unit that end with a step's code: the state of the step, and whatever is above it."""
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

    They are looked up in `held`, the numbers of all states, which threads exchange by shared memory, or in `numbers`
    in memory. Joining steps moves nothing, it only gives them names.
    """
    found = ()
    for step in tl.static_range(32):
        found = found + ((stream_bits(words, step, BITS, MEMORY) & ((1 << MEMORY) - 1)).to(tl.int32),)
    for level in tl.static_range(5):  # steps 16 apart first, so that the last index is the lowest bit of the step
        joined = ()
        for place in tl.static_range(16 >> level):
            joined = joined + (tl.join(found[place], found[place + (16 >> level)]),)
        found = joined
    states = tl.reshape(found[0], (COLUMNS * 32,))
    unit = tl.gather(held, states, 0) if SHARED else tl.load(numbers + states * VALUES + VALUE)
    return tl.reshape(unit, (COLUMNS, 32)).to(tl.float32)


@triton.jit
def unit_rows(
    top, column, known, numbers, first_numbers, second_numbers, width: tl.constexpr, COLUMNS: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Return the rows of a unit in some columns, float32 `[columns, 32 VALUES]`, but for the scales of the rows."""
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
    """Return the numbers of all states where threads exchange them, else their address."""
    found = numbers
    if SHARED and VALUE < VALUES:
        found = tl.load(numbers + tl.arange(0, 1 << MEMORY) * VALUES + VALUE)
    return found


@triton.jit
def stream_matrix(
    words, units, scale, numbers, y, width: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
    MEMORY: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes a unit of the matrix `y` `[out, in]`, in `BLOCKS` blocks of columns."""
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
        found = unit_rows(
            top, column, known, numbers, first_numbers, second_numbers, width, COLUMNS, BITS, VALUES, MEMORY, SHARED
        )  # fmt: skip
        found = (found * factor[None, :]).to(y.dtype.element_ty)
        tl.store(y + row.to(tl.int64)[None, :] * width + column[:, None], found, mask=known[:, None] & here[None, :])


@triton.jit(do_not_specialize=["tokens"])
def stream_product(
    x, words, units, scale, numbers, low_rank, onto, y,
    tokens, out, ranks, width: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr, SHARED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ONTO: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes `y` `[tokens, out]`: the product of `x` `[tokens, in]` with a unit, see `layouts`.

    `low_rank` is (left, low, starts); `onto` float32 `[tokens, out]` is added. `TOKENS` is 1, or those of a program.
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
        found = unit_rows(
            top, column, known, numbers, first_numbers, second_numbers, width, COLUMNS, BITS, VALUES, MEMORY, SHARED
        )  # fmt: skip
        if TOKENS == 1:
            total += found * tl.load(x + first * width + column, mask=known, other=0).to(tl.float32)[:, None]
        else:
            place = x + token[:, None] * width + column[None, :]
            given = tl.load(place, mask=(token < tokens)[:, None] & known[None, :], other=0)
            total = tl.dot(given, found.to(given.dtype), total, input_precision="ieee")
    sums = tl.sum(total, 0)[None, :] if TOKENS == 1 else total
    inside = tl.arange(0, ROWS)
    row = tl.load(unit + 1) + inside
    here = inside < tl.load(unit + 2)
    sums *= tl.load(scale + row, mask=here, other=0)[None, :]
    if RANK:
        for one in range(TOKENS):
            if first + one < tokens:
                low = low_rank[1] + (first + one) * ranks
                more = low_rank_sums(low_rank[0], low, low_rank[2], row, here, RANK, RANK_BLOCK)
                sums += tl.where(tl.arange(0, TOKENS)[:, None] == one, more[None, :], 0.0)
    place = token[:, None] * out + row[None, :]
    there = (token < tokens)[:, None] & here[None, :]
    if ONTO:
        sums += tl.load(onto + place, mask=there, other=0)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=there)
