"""Launches of the kernels: which constants they are compiled for and how much of a matrix a program takes.

The functions here work wherever Triton runs, also under its interpreter on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from llmcompress.kernels.gpu.grid_triton import grid_matrix, grid_product
from llmcompress.kernels.gpu.layouts import PLANES, Branch, GridRows, InputChange, SalientRows, StreamRows
from llmcompress.kernels.gpu.trellis_triton import stream_matrix, stream_product
from llmcompress.kernels.gpu.turn_triton import multiply, turn

MOST_SHARED = 14  # bits of a state: numbers of so many states are looked up in shared memory
TILE = 16  # tokens that a program multiplies at once by tensor cores


@dataclass(frozen=True)
class Shares:
    """The amount that a program takes at a time, and its warps. Fields are None where the size of the matrix decides.

    Attributes:
        rows: of a grid.
        words: of a row of a grid; each holds 32 bits of the widest plane.
        columns: of a trellis.
        warps: of 32 threads.
    """

    rows: int | None = None
    words: int | None = None
    columns: int | None = None
    warps: int | None = None


DEFAULT = Shares()


@dataclass(frozen=True, eq=False)
class LowRankInputs:
    """A low-rank term whose right factor is already multiplied: `low` `[tokens, ranks]`; see `layouts.LowRankRows`."""

    left: Tensor
    low: Tensor
    starts: Tensor


def launch_turn(x: Tensor, change: InputChange) -> Tensor:
    """Return the changed inputs `[tokens, in]`, in the dtype of `x` `[tokens, in]`."""
    (tokens, width), block = x.shape, change.block
    y = torch.empty_like(x)
    if tokens == 0:
        return y
    with torch.cuda.device_of(x):
        if block == 1:
            columns = 1024
            multiply[(tokens, triton.cdiv(width, columns))](x, change.factors, y, width, COLUMNS=columns)
        else:
            warps = min(16, max(1, block // 1024))
            sizes = {"BLOCK": block, "LEVELS": block.bit_length() - 1, "num_warps": warps}
            turn[(tokens, width // block)](x, change.factors, y, width, **sizes)
    return y


# --- grids ----------------------------------------------------------------------------------------------------------


def grid_constants(
    rows: GridRows, salient: SalientRows | None, rank: int, onto: bool, tokens: int, shares: Shares = DEFAULT
) -> dict[str, Any]:
    """Return the constants that the kernel is compiled for, and its number of warps."""
    widths = PLANES[rows.bits]
    words = rows.planes[0].shape[1]
    one = tokens == 1
    span = triton.next_power_of_2(max(words, 16))
    # One token: a thread has four neighbouring words of each row, and the inputs of these for all rows.
    warps = shares.warps or (min(4, max(1, span // 128)) if one else 4)
    whole = rows.span * (32 // widths[0]) == rows.group and rows.size[1] % rows.group == 0
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
        "WHOLE": whole,
        "ONE_GROUP": rows.scale.shape[1] == 1,
        "SALIENT": salient is not None,
        "INSIDE_GROUP": salient.group if salient else 1,
        "INSIDE_CENTRE": (salient.levels - 1) / 2 if salient else 0.0,
        "CODED": salient is not None and salient.scale is not None,
        "SHARED": salient is not None and salient.shared,
        **_rank_constants(rank),
        "ONTO": onto,
        "TOKENS": 1 if one else TILE,
        "ROWS": shares.rows or (8 if one else 32),
        "WORDS": min(span, shares.words or (128 * warps if one else 32)),
        "ENTRIES": 32,
        "num_warps": warps,
    }


def launch_grid(
    x: Tensor,
    rows: GridRows,
    salient: SalientRows | None,
    low_rank: LowRankInputs | None,
    onto: Tensor | None,
    dtype: torch.dtype,
    shares: Shares = DEFAULT,
) -> Tensor:
    """Return the product `[tokens, out]` of `x` `[tokens, in]` in a dtype; `onto` float32 `[tokens, out]` is added."""
    out, tokens = rows.size[0], len(x)
    y = torch.empty(tokens, out, dtype=dtype, device=x.device)
    if tokens == 0:
        return y
    constants = grid_constants(
        rows, salient, 0 if low_rank is None else low_rank.left.shape[1], onto is not None, tokens, shares
    )
    absent = rows.scale  # in the place of tensors that are not there; the constants say so
    inside = absent if salient is None or salient.scale is None else salient.scale
    given = (
        x,
        rows.planes,
        rows.scale,
        absent if rows.zero is None else rows.zero,
        (absent,) * 4 if salient is None else (salient.starts, salient.columns, salient.numbers, inside),
        *_rank_tensors(low_rank, absent),
        absent if onto is None else onto,
        y,
    )
    with torch.cuda.device_of(x):
        programs = (triton.cdiv(out, constants["ROWS"]), triton.cdiv(tokens, constants["TOKENS"]))
        grid_product[programs](*given, tokens, out, inside.shape[1], _ranks(low_rank), **constants)
    return y


# --- trellises ------------------------------------------------------------------------------------------------------


def stream_constants(rows: StreamRows, rank: int, onto: bool, tokens: int, shares: Shares = DEFAULT) -> dict[str, Any]:
    """Return the constants that the kernel is compiled for, and its number of warps."""
    one = tokens == 1
    threads = 4 if rows.size[1] < 4096 else 8
    columns = triton.next_power_of_2(max(rows.size[1], 16))
    return {
        "width": rows.size[1],
        "BITS": rows.bits,
        "VALUES": rows.values,
        "MEMORY": rows.memory,
        "SHARED": rows.memory <= MOST_SHARED,
        **_rank_constants(rank),
        "ONTO": onto,
        "TOKENS": 1 if one else TILE,
        "STAGES": 4,  # columns that are on their way from memory while others are decoded
        "COLUMNS": min(columns, shares.columns or (32 * threads if one else 128)),
        "num_warps": shares.warps or (threads if one else 4),
    }


def launch_streams(
    x: Tensor,
    rows: StreamRows,
    low_rank: LowRankInputs | None,
    onto: Tensor | None,
    dtype: torch.dtype,
    shares: Shares = DEFAULT,
) -> Tensor:
    """Return the product `[tokens, out]` of `x` `[tokens, in]` in a dtype; `onto` float32 `[tokens, out]` is added."""
    out, tokens = rows.size[0], len(x)
    y = torch.empty(tokens, out, dtype=dtype, device=x.device)
    if tokens == 0:
        return y
    constants = stream_constants(rows, _rank(low_rank), onto is not None, tokens, shares)
    absent = rows.scale
    given = (x, rows.words, rows.units, rows.scale, rows.numbers, *_rank_tensors(low_rank, absent))
    with torch.cuda.device_of(x):
        programs = (len(rows.units), triton.cdiv(tokens, constants["TOKENS"]))
        stream_product[programs](
            *given, absent if onto is None else onto, y, tokens, out, _ranks(low_rank), **constants
        )
    return y


# --- whole matrices -------------------------------------------------------------------------------------------------


def launch_matrix(branch: Branch, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]` of a branch in a dtype, decoded."""
    rows = branch.rows
    y = torch.empty(rows.size, dtype=dtype, device=rows.scale.device)
    out, width = rows.size
    with torch.cuda.device_of(y):
        if isinstance(rows, StreamRows):
            sizes = stream_constants(rows, 0, False, TILE)
            columns, blocks = sizes["COLUMNS"], 4
            kept = {key: sizes[key] for key in ("width", "BITS", "VALUES", "MEMORY", "SHARED", "COLUMNS", "STAGES")}
            programs = (len(rows.units), triton.cdiv(width, columns * blocks))
            given = (rows.words, rows.units, rows.scale, rows.numbers, y)
            stream_matrix[programs](*given, **kept, BLOCKS=blocks, num_warps=sizes["num_warps"])
        else:
            sizes = grid_constants(rows, None, 0, False, TILE)
            names = ("width", "words", "groups", "WIDTHS", "BITS", "CENTRE", "ZERO", "GROUP", "SPAN")
            kept, tile = {key: sizes[key] for key in names}, (8, 64)
            programs = (triton.cdiv(out, tile[0]), triton.cdiv(sizes["words"], tile[1]))
            zero = rows.scale if rows.zero is None else rows.zero
            grid_matrix[programs](rows.planes, rows.scale, zero, y, out, **kept, ROWS=tile[0], WORDS=tile[1])
    return y if branch.salient is None else _with_salient(y, branch.salient)


def _with_salient(y: Tensor, salient: SalientRows) -> Tensor:
    """Put single weights in the place of those of a matrix."""
    count, out = len(salient.numbers), len(y)
    row = torch.repeat_interleave(torch.arange(out, device=y.device), salient.starts.diff(), output_size=count)
    column = salient.columns.long()
    column = column.repeat(out) if salient.shared else column
    numbers = salient.numbers.float()
    if salient.scale is not None:
        numbers = (numbers - (salient.levels - 1) / 2) * salient.scale[row, column // salient.group].float()
    y[row, column] = numbers.to(y.dtype)
    return y


# --- low rank -------------------------------------------------------------------------------------------------------


def _rank_constants(rank: int) -> dict[str, int]:
    return {"RANK": rank, "RANK_BLOCK": triton.next_power_of_2(max(rank, 1))}


def _rank_tensors(term: LowRankInputs | None, absent: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor]]:
    return ((absent,) * 3,) if term is None else ((term.left, term.low, term.starts),)


def _rank(term: LowRankInputs | None) -> int:
    return 0 if term is None else term.left.shape[1]


def _ranks(term: LowRankInputs | None) -> int:
    return 1 if term is None else term.low.shape[1]
