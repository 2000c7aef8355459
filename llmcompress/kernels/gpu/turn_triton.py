"""The change of inputs that goes before a product, by Triton: factors of columns, then a Hadamard transform."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def butterfly(values, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Return sums and differences `[BLOCK]` of the values that lie `HALF` apart."""
    pairs = tl.permute(tl.reshape(values, (BLOCK // (2 * HALF), 2, HALF)), (0, 2, 1))
    low, high = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (BLOCK,))


@triton.jit
def turn(x, factors, y, width, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Writes `y` `[tokens, in]`, the transform of `x * factors`; a program's columns lie `in / BLOCK` apart.

    `LEVELS` is the logarithm of `BLOCK`.
    """
    rest = width // BLOCK
    column = tl.program_id(1) + tl.arange(0, BLOCK) * rest
    place = tl.program_id(0) * width + column
    values = tl.load(x + place).to(tl.float32) * tl.load(factors + column)
    for level in tl.static_range(LEVELS):
        values = butterfly(values, 1 << level, BLOCK)
    tl.store(y + place, values.to(y.dtype.element_ty))


@triton.jit
def multiply(x, factors, y, width, COLUMNS: tl.constexpr):
    """Writes `y` `[tokens, in]`, `x * factors`."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < width
    place = tl.program_id(0) * width + column
    values = tl.load(x + place, mask=known).to(tl.float32) * tl.load(factors + column, mask=known)
    tl.store(y + place, values.to(y.dtype.element_ty), mask=known)
