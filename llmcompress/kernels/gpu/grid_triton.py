"""The product of a few tokens with grids, salient weights and a low-rank term, by Triton.

A program takes `ROWS` rows and all of their columns, so sums have one order and no program waits for another. One
token: codes become the mantissas of floats in [1, 2), and the 1 and the zero point are subtracted from the sum of a
word; that takes three instructions a weight. More tokens: weights are decoded in the dtype of the inputs and multiplied
by tensor cores, 16 tokens at a time. The launches also work under Triton's interpreter on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress.kernels.gpu.layouts import PLANES, GridRows, SalientRows

TILE = 16  # tokens that a program multiplies at once by tensor cores


@dataclass(frozen=True, eq=False)
class LowRankInputs:
    """A low-rank term whose right factor is already multiplied: `left` `[out, rank]`, `low` `[tokens, rank]`."""

    left: Tensor
    low: Tensor


def launch_grid(
    x: Tensor,
    rows: GridRows,
    salient: SalientRows | None,
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
    constants = grid_constants(rows, salient, rank_of(low_rank), onto is not None, tokens) | dict(changed or {})
    absent = rows.scale  # in the place of missing tensors, which the constants exclude
    inside = absent if salient is None or salient.scale is None else salient.scale
    tensors = (
        x,
        rows.planes,
        rows.scale,
        absent if rows.zero is None else rows.zero,
        (absent,) * 4 if salient is None else (salient.starts, salient.columns, salient.numbers, inside),
        (absent,) * 2 if low_rank is None else (low_rank.left, low_rank.low),
        absent if onto is None else onto,
        y,
    )
    with torch.cuda.device_of(x):
        programs = (triton.cdiv(out, constants["ROWS"]), triton.cdiv(tokens, constants["TOKENS"]))
        grid_product[programs](*tensors, tokens, out, inside.shape[1], **constants)
    return y


def grid_constants(rows: GridRows, salient: SalientRows | None, rank: int, onto: bool, tokens: int) -> dict[str, Any]:
    """Return the constants that the kernel is compiled for, and its number of warps."""
    widths = PLANES[rows.bits]
    words = rows.planes[0].shape[1]
    single = tokens == 1
    span = triton.next_power_of_2(max(words, 16))
    # One token: a thread has four neighbouring words of each row, and the inputs of these for all rows.
    warps = min(4, max(1, span // 128)) if single else 4
    return {
        "width": rows.size[1],
        "words": words,
        "groups": rows.scale.shape[1],
        "WIDTHS": widths,
        "BITS": rows.bits,
        "CENTRE": (rows.levels - 1) / 2,
        "ZERO": rows.zero is not None,
        "GROUP": rows.group,
        "SPAN": rows.span,
        "WHOLE": rows.span * (32 // widths[0]) == rows.group and rows.size[1] % rows.group == 0,
        "ONE_GROUP": rows.scale.shape[1] == 1,
        "SALIENT": salient is not None,
        "INSIDE_GROUP": salient.group if salient else 1,
        "INSIDE_CENTRE": (salient.levels - 1) / 2 if salient else 0.0,
        "CODED": salient is not None and salient.scale is not None,
        "SHARED": salient is not None and salient.shared,
        **rank_constants(rank),
        "ONTO": onto,
        "TOKENS": 1 if single else TILE,
        "ROWS": 8 if single else 32,
        "WORDS": min(span, 128 * warps if single else 32),
        "ENTRIES": 32,
        "num_warps": warps,
    }


def rank_of(term: LowRankInputs | None) -> int:
    """Return the rank of a term, 0 for none."""
    return 0 if term is None else term.left.shape[1]


def rank_constants(rank: int) -> dict[str, int]:
    """Return the constants of a low-rank term."""
    return {"RANK": rank, "RANK_BLOCK": triton.next_power_of_2(max(rank, 1))}


def decode_grid(rows: GridRows, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]` of a grid in a dtype."""
    y = torch.empty(rows.size, dtype=dtype, device=rows.scale.device)
    constants, height, width = grid_constants(rows, None, 0, False, TILE), 8, 64
    names = ("width", "words", "groups", "WIDTHS", "BITS", "CENTRE", "ZERO", "GROUP", "SPAN")
    sizes = {name: constants[name] for name in names}
    programs = (triton.cdiv(rows.size[0], height), triton.cdiv(constants["words"], width))
    zero = rows.scale if rows.zero is None else rows.zero
    with torch.cuda.device_of(y):
        grid_matrix[programs](rows.planes, rows.scale, zero, y, rows.size[0], **sizes, ROWS=height, WORDS=width)
    return y


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def plane_field(word, FIELD: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Return field number `FIELD` of words, `WIDTH` bits, moved so that it begins at bit `LOW`."""
    SHIFT: tl.constexpr = FIELD * WIDTH - LOW
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << LOW
    return (word >> SHIFT if SHIFT >= 0 else word << -SHIFT) & MASK


@triton.jit
def grid_value(words, unit, FIELD: tl.constexpr, WIDTHS: tl.constexpr, BITS: tl.constexpr):
    """Return 1 + code / 2^BITS, float32: the code in the highest bits of the mantissa; `unit` has the bits of 1."""
    LOW: tl.constexpr = 23 - BITS
    bits = plane_field(words[0], FIELD, WIDTHS[0], LOW) | unit
    if len(WIDTHS) > 1:
        bits |= plane_field(words[1], FIELD, WIDTHS[1], LOW + WIDTHS[0])
    if len(WIDTHS) > 2:
        bits |= plane_field(words[2], FIELD, WIDTHS[2], LOW + WIDTHS[0] + WIDTHS[1])
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def grid_words(planes, row, word, mask, count, WIDTHS: tl.constexpr):
    """Load words `[rows, words]` of all planes. A narrower plane's is moved so that its fields begin at bit 0."""
    found = (tl.load(planes[0] + row[:, None] * count + word[None, :], mask=mask, other=0),)
    for plane in tl.static_range(1, len(WIDTHS)):
        found = found + (shared_words(planes[plane], row, word, mask, count, WIDTHS[0] // WIDTHS[plane]),)
    return found


@triton.jit
def shared_words(plane, row, word, mask, count, SHARE: tl.constexpr):
    """Load the words of a narrower plane, each of which is shared by `SHARE` words of the widest."""
    place = row[:, None] * (count // SHARE) + word[None, :] // SHARE
    held = tl.load(plane + place, mask=mask, other=0)
    return held >> (word[None, :] % SHARE * (32 // SHARE))


@triton.jit
def salient_sums(
    x, salient, scale, zero, row, here, groups, inside_groups,
    GROUP: tl.constexpr, CENTRE: tl.constexpr, ZERO: tl.constexpr,
    INSIDE_GROUP: tl.constexpr, INSIDE_CENTRE: tl.constexpr, CODED: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Return sums `[rows]` over the salient weights, each less the grid's weight in its place, for one token."""
    starts, columns, numbers, inside = salient
    first = tl.load(starts + row, mask=here, other=0)
    last = tl.load(starts + row + 1, mask=here, other=0)
    total = tl.zeros((ROWS, ENTRIES), tl.float32)
    for begin in range(0, tl.max(last - first, 0), ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        place = first[:, None] + entry[None, :]
        mask = place < last[:, None]
        column = tl.load(columns + (entry[None, :] + tl.zeros_like(place) if SHARED else place), mask=mask, other=0)
        column = column.to(tl.int32)
        number = tl.load(numbers + place, mask=mask, other=0).to(tl.float32)
        if CODED:
            step = tl.load(inside + row[:, None] * inside_groups + column // INSIDE_GROUP, mask=mask, other=0)
            number = (number - INSIDE_CENTRE) * step.to(tl.float32)
        group = row[:, None] * groups + column // GROUP
        centre = tl.load(zero + group, mask=mask, other=0).to(tl.float32) if ZERO else CENTRE
        number += centre * tl.load(scale + group, mask=mask, other=0).to(tl.float32)
        total += number * tl.load(x + column, mask=mask, other=0).to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def low_rank_sums(left, low, row, here, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Return `left[row] @ low`, float32 `[rows]`, for one token."""
    place = tl.arange(0, BLOCK)[None, :]
    known = place < RANK
    factor = tl.load(left + row[:, None] * RANK + place, mask=here[:, None] & known, other=0).to(tl.float32)
    return tl.sum(factor * tl.load(low + place, mask=known, other=0).to(tl.float32), 1)


@triton.jit
def more_sums(
    x, salient, scale, zero, low_rank, row, here, first, tokens, groups, inside_groups, width: tl.constexpr,
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
                more += low_rank_sums(low_rank[0], low_rank[1] + (first + each) * RANK, row, here, RANK, RANK_BLOCK)
            sums += tl.where(tl.arange(0, TOKENS)[None, :] == each, more[:, None], 0.0)
    return sums


@triton.jit
def word_sums(
    x, held, word, token, tokens, step, centre, unit, total, words: tl.constexpr, width: tl.constexpr,
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
        value = grid_value(held, unit, field, WIDTHS, BITS)
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
    """Write the rows and words of a program of the matrix `y` `[out, in]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = (row < out)[:, None] & (word < words)[None, :]
    held = grid_words(planes, row, word, mask, words, WIDTHS)
    group, inner = word // SPAN, word % SPAN
    place = row[:, None] * groups + group[None, :]
    step = tl.load(scale + place, mask=mask, other=0).to(tl.float32)
    centre = tl.load(zero + place, mask=mask, other=0).to(tl.float32) if ZERO else CENTRE
    LEVELS: tl.constexpr = 1 << BITS
    for field in tl.static_range(32 // WIDTHS[0]):
        column = group * GROUP + field * SPAN + inner
        known = mask & ((field * SPAN + inner < GROUP) & (column < width))[None, :]
        value = (grid_value(held, 0x3F800000, field, WIDTHS, BITS) * LEVELS - (LEVELS + centre)) * step
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["tokens"])
def grid_product(
    x, planes, scale, zero, salient, low_rank, onto, y,
    tokens, out, inside_groups, width: tl.constexpr, words: tl.constexpr, groups: tl.constexpr,
    WIDTHS: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr, ONE_GROUP: tl.constexpr,
    SALIENT: tl.constexpr, INSIDE_GROUP: tl.constexpr, INSIDE_CENTRE: tl.constexpr,
    CODED: tl.constexpr, SHARED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ONTO: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write `y` `[tokens, out]`: the product of `x` `[tokens, in]` with the rows of a program, see `layouts`.

    `salient` is (starts, columns, numbers, scale), `low_rank` (left, low); `onto` float32 `[tokens, out]` is added.
    `TOKENS` is 1, or the tokens of a program. `WHOLE`: groups fill their words and the row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < out
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    unit = tl.where(tokens > 0, 0x3F800000, 0)  # in a register: an instruction that masks and sets has one constant
    total = tl.zeros((ROWS, WORDS if TOKENS == 1 else TOKENS), tl.float32)
    for begin in range(0, words, WORDS):
        word = begin + tl.arange(0, WORDS)
        mask = here[:, None] & (word < words)[None, :]
        held = grid_words(planes, row, word, mask, words, WIDTHS)
        if ONE_GROUP:
            place, known_row = row[:, None], here[:, None]
        else:
            place, known_row = row[:, None] * groups + (word // SPAN)[None, :], mask
        step = tl.load(scale + place, mask=known_row, other=0).to(tl.float32)
        centre = tl.load(zero + place, mask=known_row, other=0).to(tl.float32) if ZERO else CENTRE
        total = word_sums(
            x, held, word, first if TOKENS == 1 else token, tokens, step, centre, unit, total, words, width,
            WIDTHS, BITS, GROUP, SPAN, WHOLE, TOKENS, ROWS, WORDS,
        )  # fmt: skip
    sums = tl.sum(total, 1)[:, None] if TOKENS == 1 else total
    if SALIENT or RANK:
        sums += more_sums(
            x, salient, scale, zero, low_rank, row, here, first, tokens, groups, inside_groups, width,
            SALIENT, GROUP, CENTRE, ZERO, INSIDE_GROUP, INSIDE_CENTRE, CODED, SHARED,
            RANK, RANK_BLOCK, TOKENS, ROWS, ENTRIES,
        )  # fmt: skip
    place = token[None, :] * out + row[:, None]
    mask = here[:, None] & (token < tokens)[None, :]
    if ONTO:
        sums += tl.load(onto + place, mask=mask, other=0)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=mask)
