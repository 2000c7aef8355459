"""The kernel that rounds or prunes a run of columns and feeds their errors on, on GPUs: see `GridBlock`.

A program carries some rows through all columns: it subtracts earlier errors, and writes codes and errors. Only
programs that round on GPUs import this file: Triton comes with torch for GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress.kernels.column_block import GridBlock

ROWS = 128  # of a program
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: numbers added to it are rounded to whole ones, to even


def round_columns(block: GridBlock, errors: Tensor) -> None:
    """Round the columns of a block; see `GridBlock`."""
    columns, out = block.current.shape
    feeds = block.shares is not None
    shares, before = (block.current if each is None else each for each in (block.shares, block.before))
    given = (block.current, *block.parameters, block.groups, shares, before)
    with torch.cuda.device_of(block.current):
        grid_columns[(triton.cdiv(out, ROWS),)](
            *given, errors, len(block.groups), columns, out, block.levels - 1,
            FEEDS=feeds, AGAIN=block.before is not None, PRUNES=block.levels == 0, ROWS=ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rounded", "columns", "top"])
def grid_columns(
    current, inverse, middle, scale, groups, shares, before, errors, rounded, columns, out, top,
    FEEDS: tl.constexpr, AGAIN: tl.constexpr, PRUNES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round the rows of a program in the first columns, and move the others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < out
    for column in range(rounded):
        wanted = _less_errors(current, shares, errors, column, column, columns, out, row, here, FEEDS)
        at = tl.load(groups + column) * out + row
        factor = tl.load(scale + at, mask=here, other=0.0)
        if PRUNES:
            bits = wanted.to(tl.int32, bitcast=True)  # rounded to bfloat16, to even
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000
            stored = bits.to(tl.float32, bitcast=True) * factor
        else:
            centre = tl.load(middle + at, mask=here, other=0.0)
            code = tl.fma(wanted, tl.load(inverse + at, mask=here, other=0.0), centre)
            code = tl.minimum(tl.maximum(code, 0.0), top.to(tl.float32)) + ROUNDING - ROUNDING
            stored = (code - centre) * factor
        if FEEDS:
            error = stored - tl.load(before + column * out + row, mask=here, other=0.0) if AGAIN else wanted - stored
            tl.store(errors + column * out + row, error, mask=here)
        tl.store(current + column * out + row, stored, mask=here)
    if FEEDS:
        for column in range(rounded, columns):
            wanted = _less_errors(current, shares, errors, column, rounded, columns, out, row, here, FEEDS)
            tl.store(current + column * out + row, wanted, mask=here)


@triton.jit
def _less_errors(current, shares, errors, column, count, columns, out, row, here, FEEDS: tl.constexpr):
    """Return a column less the shares of the errors of the first `count` columns; each thread wrote its own errors."""
    wanted = tl.load(current + column * out + row, mask=here, other=0.0)
    if FEEDS:
        for earlier in tl.range(0, count, loop_unroll_factor=8):
            error = tl.load(errors + earlier * out + row, mask=here, other=0.0)
            wanted = tl.fma(error, 0.0 - tl.load(shares + earlier * columns + column), wanted)
    return wanted
