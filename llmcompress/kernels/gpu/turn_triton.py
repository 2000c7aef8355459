"""The change of inputs that goes before a product, by Triton: factors of columns, then a Hadamard transform."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress.kernels.gpu.layouts import InputChange

COLUMNS = 1024  # that a program multiplies by factors


def launch_turn(x: Tensor, change: InputChange) -> Tensor:
    """Return the changed inputs `[tokens, in]`, in the dtype of `x` `[tokens, in]`."""
    (tokens, width), block = x.shape, change.block
    y = torch.empty_like(x)
    if tokens == 0:
        return y
    with torch.cuda.device_of(x):
        if block == 1:
            multiply[(tokens, triton.cdiv(width, COLUMNS))](x, change.factors, y, width, COLUMNS=COLUMNS)
        else:
            sizes = {"BLOCK": block, "LEVELS": block.bit_length() - 1, "num_warps": min(16, max(1, block // 1024))}
            turn[(tokens, width // block)](x, change.factors, y, width, **sizes)
    return y


@triton.jit
def butterfly(values, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Return sums and differences `[BLOCK]` of the values that lie `HALF` apart."""
    pairs = tl.permute(tl.reshape(values, (BLOCK // (2 * HALF), 2, HALF)), (0, 2, 1))
    low, high = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (BLOCK,))


@triton.jit
def turn(x, factors, y, width, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Write `y` `[tokens, in]`, the transform of `x * factors`; a program's columns lie `in / BLOCK` apart.

    `LEVELS` is the logarithm of `BLOCK`.
    """
    rest = width // BLOCK
    column = tl.program_id(1) + tl.arange(0, BLOCK) * rest
    place = tl.program_id(0).to(tl.int64) * width + column
    values = tl.load(x + place).to(tl.float32) * tl.load(factors + column)
    for level in tl.static_range(LEVELS):
        values = butterfly(values, 1 << level, BLOCK)
    tl.store(y + place, values.to(y.dtype.element_ty))


@triton.jit
def multiply(x, factors, y, width, COLUMNS: tl.constexpr):
    """Write `y` `[tokens, in]`, `x * factors`."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    values = tl.load(x + place, mask=known).to(tl.float32) * tl.load(factors + column, mask=known)
    tl.store(y + place, values.to(y.dtype.element_ty), mask=known)
