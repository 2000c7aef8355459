"""The product of a few tokens with grids, salient weights and a low-rank term, by Triton.

A program takes `ROWS` rows and all of their columns, so sums are taken in one order and no program waits for another.
One token: codes become the mantissas of floats in [1, 2), and the 1 and the zero point are taken off the sum of a word;
that takes three instructions a weight. More tokens: weights are decoded in the dtype of the inputs and multiplied by
tensor cores, 16 tokens at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane_field(word, FIELD: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Return field number `FIELD` of words, `WIDTH` bits, moved so that it begins at bit `LOW`."""
    SHIFT: tl.constexpr = FIELD * WIDTH - LOW
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << LOW
    return (word >> SHIFT if SHIFT >= 0 else word << -SHIFT) & MASK


@triton.jit
def grid_value(words, one, FIELD: tl.constexpr, WIDTHS: tl.constexpr, BITS: tl.constexpr):
    """Return 1 + code / 2^BITS, float32: the code in the highest bits of the mantissa; `one` has the bits of 1."""
    LOW: tl.constexpr = 23 - BITS
    found = plane_field(words[0], FIELD, WIDTHS[0], LOW) | one
    if len(WIDTHS) > 1:
        found |= plane_field(words[1], FIELD, WIDTHS[1], LOW + WIDTHS[0])
    if len(WIDTHS) > 2:
        found |= plane_field(words[2], FIELD, WIDTHS[2], LOW + WIDTHS[0] + WIDTHS[1])
    return found.to(tl.float32, bitcast=True)


@triton.jit
def grid_words(planes, row, word, there, count, WIDTHS: tl.constexpr):
    """Load words `[rows, words]` of all planes. A narrower plane's is moved so that its fields begin at bit 0."""
    found = (tl.load(planes[0] + row[:, None] * count + word[None, :], mask=there, other=0),)
    for plane in tl.static_range(1, len(WIDTHS)):
        found = found + (shared_words(planes[plane], row, word, there, count, WIDTHS[0] // WIDTHS[plane]),)
    return found


@triton.jit
def shared_words(plane, row, word, there, count, SHARE: tl.constexpr):
    """Load the words of a narrower plane, each of which is shared by `SHARE` words of the widest."""
    place = row[:, None] * (count // SHARE) + word[None, :] // SHARE
    held = tl.load(plane + place, mask=there, other=0)
    return held >> (word[None, :] % SHARE * (32 // SHARE))


@triton.jit
def salient_sums(
    x, salient, scale, zero, row, here, groups, inside_groups,
    GROUP: tl.constexpr, CENTRE: tl.constexpr, ZERO: tl.constexpr,
    INSIDE_GROUP: tl.constexpr, INSIDE_CENTRE: tl.constexpr, CODED: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Return sums `[rows]` over the salient weights, each less what the grid has in its place, for one token."""
    starts, columns, numbers, inside = salient
    first = tl.load(starts + row, mask=here, other=0)
    last = tl.load(starts + row + 1, mask=here, other=0)
    total = tl.zeros((ROWS, ENTRIES), tl.float32)
    for begin in range(0, tl.max(last - first, 0), ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        place = first[:, None] + entry[None, :]
        there = place < last[:, None]
        column = tl.load(columns + (entry[None, :] + tl.zeros_like(place) if SHARED else place), mask=there, other=0)
        column = column.to(tl.int32)
        number = tl.load(numbers + place, mask=there, other=0).to(tl.float32)
        if CODED:
            step = tl.load(inside + row[:, None] * inside_groups + column // INSIDE_GROUP, mask=there, other=0)
            number = (number - INSIDE_CENTRE) * step.to(tl.float32)
        group = row[:, None] * groups + column // GROUP
        centre = tl.load(zero + group, mask=there, other=0).to(tl.float32) if ZERO else CENTRE
        number += centre * tl.load(scale + group, mask=there, other=0).to(tl.float32)
        total += number * tl.load(x + column, mask=there, other=0).to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def low_rank_sums(left, low, starts, row, here, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Return `left[row] @ low[starts[row]:][:RANK]`, float32 `[rows]`, for one token."""
    place = tl.arange(0, BLOCK)[None, :]
    there = here[:, None] & (place < RANK)
    factor = tl.load(left + row[:, None] * RANK + place, mask=there, other=0).to(tl.float32)
    start = tl.load(starts + row, mask=here, other=0)
    return tl.sum(factor * tl.load(low + start[:, None] + place, mask=there, other=0).to(tl.float32), 1)


@triton.jit
def more_sums(
    x, salient, scale, zero, low_rank, row, here, first, tokens, groups, inside_groups, ranks, width: tl.constexpr,
    SALIENT: tl.constexpr, GROUP: tl.constexpr, CENTRE: tl.constexpr, ZERO: tl.constexpr,
    INSIDE_GROUP: tl.constexpr, INSIDE_CENTRE: tl.constexpr, CODED: tl.constexpr, SHARED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Return sums `[rows, tokens]` over salient weights and of the low-rank term, one token after the other."""
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for each in range(TOKENS):
        if first + each < tokens:
            more = tl.zeros((ROWS,), tl.float32)
            if SALIENT:
                more += salient_sums(
                    x + (first + each) * width, salient, scale, zero, row, here, groups, inside_groups,
                    GROUP, CENTRE, ZERO, INSIDE_GROUP, INSIDE_CENTRE, CODED, SHARED, ROWS, ENTRIES,
                )  # fmt: skip
            if RANK:
                low = low_rank[1] + (first + each) * ranks
                more += low_rank_sums(low_rank[0], low, low_rank[2], row, here, RANK, RANK_BLOCK)
            sums += tl.where(tl.arange(0, TOKENS)[None, :] == each, more[:, None], 0.0)
    return sums


@triton.jit
def word_sums(
    x, held, word, token, tokens, step, centre, one, total, words: tl.constexpr, width: tl.constexpr,
    WIDTHS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Return `total` with the products of some words of rows: `[rows, words]` for one token, else `[rows, tokens]`."""
    LEVELS: tl.constexpr = 1 << BITS
    group, inner = word // SPAN, word % SPAN
    part = tl.zeros((ROWS, WORDS), tl.float32)
    inputs = tl.zeros((WORDS,), tl.float32)
    for field in tl.static_range(32 // WIDTHS[0]):
        column = group * GROUP + field * SPAN + inner
        known = word < words
        if not WHOLE:
            known = known & (field * SPAN + inner < GROUP) & (column < width)
        value = grid_value(held, one, field, WIDTHS, BITS)
        if TOKENS == 1:
            given = tl.load(x + token * width + column, mask=known, other=0).to(tl.float32)
            part += value * given[None, :]
            inputs += given
        else:
            place = x + token[None, :] * width + column[:, None]
            given = tl.load(place, mask=known[:, None] & (token < tokens)[None, :], other=0)
            weight = ((value * LEVELS - (LEVELS + centre)) * step).to(given.dtype)
            total = tl.dot(weight, given, total, input_precision="ieee")
    if TOKENS == 1:
        total += step * (part * LEVELS - (LEVELS + centre) * inputs[None, :])
    return total


@triton.jit
def grid_matrix(
    planes, scale, zero, y, out, width: tl.constexpr, words: tl.constexpr, groups: tl.constexpr,
    WIDTHS: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Writes the rows and words of a program of the matrix `y` `[out, in]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = (row < out)[:, None] & (word < words)[None, :]
    held = grid_words(planes, row, word, there, words, WIDTHS)
    group, inner = word // SPAN, word % SPAN
    place = row[:, None] * groups + group[None, :]
    step = tl.load(scale + place, mask=there, other=0).to(tl.float32)
    centre = tl.load(zero + place, mask=there, other=0).to(tl.float32) if ZERO else CENTRE
    LEVELS: tl.constexpr = 1 << BITS
    for field in tl.static_range(32 // WIDTHS[0]):
        column = group * GROUP + field * SPAN + inner
        known = there & ((field * SPAN + inner < GROUP) & (column < width))[None, :]
        value = (grid_value(held, 0x3F800000, field, WIDTHS, BITS) * LEVELS - (LEVELS + centre)) * step
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["tokens"])
def grid_product(
    x, planes, scale, zero, salient, low_rank, onto, y,
    tokens, out, inside_groups, ranks, width: tl.constexpr, words: tl.constexpr, groups: tl.constexpr,
    WIDTHS: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr, ONE_GROUP: tl.constexpr,
    SALIENT: tl.constexpr, INSIDE_GROUP: tl.constexpr, INSIDE_CENTRE: tl.constexpr,
    CODED: tl.constexpr, SHARED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ONTO: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Writes `y` `[tokens, out]`: the product of `x` `[tokens, in]` with the rows of a program, see `layouts`.

    `salient` is (starts, columns, numbers, scale), `low_rank` (left, low, starts); `onto` float32 `[tokens, out]` is
    added. `TOKENS` is 1, or the tokens of a program. `WHOLE`: groups fill their words and the row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < out
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    one = tl.where(tokens > 0, 0x3F800000, 0)  # in a register: an instruction that masks and sets has one constant
    total = tl.zeros((ROWS, WORDS if TOKENS == 1 else TOKENS), tl.float32)
    for begin in range(0, words, WORDS):
        word = begin + tl.arange(0, WORDS)
        there = here[:, None] & (word < words)[None, :]
        held = grid_words(planes, row, word, there, words, WIDTHS)
        if ONE_GROUP:
            place, known_row = row[:, None], here[:, None]
        else:
            place, known_row = row[:, None] * groups + (word // SPAN)[None, :], there
        step = tl.load(scale + place, mask=known_row, other=0).to(tl.float32)
        centre = tl.load(zero + place, mask=known_row, other=0).to(tl.float32) if ZERO else CENTRE
        total = word_sums(
            x, held, word, first if TOKENS == 1 else token, tokens, step, centre, one, total, words, width,
            WIDTHS, BITS, GROUP, SPAN, WHOLE, TOKENS, ROWS, WORDS,
        )  # fmt: skip
    sums = tl.sum(total, 1)[:, None] if TOKENS == 1 else total
    if SALIENT or RANK:
        sums += more_sums(
            x, salient, scale, zero, low_rank, row, here, first, tokens, groups, inside_groups, ranks, width,
            SALIENT, GROUP, CENTRE, ZERO, INSIDE_GROUP, INSIDE_CENTRE, CODED, SHARED,
            RANK, RANK_BLOCK, TOKENS, ROWS, ENTRIES,
        )  # fmt: skip
    place = token[None, :] * out + row[:, None]
    there = here[:, None] & (token < tokens)[None, :]
    if ONTO:
        sums += tl.load(onto + place, mask=there, other=0)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=there)
