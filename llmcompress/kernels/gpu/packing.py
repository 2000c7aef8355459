"""Repacking of the nodes of a compressed weight into the forms of `layouts`, once, by torch on the weight's device."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from llmcompress.kernels.gpu.layouts import PLANES, WORD, GridRows, InputChange, LowRankRows, SalientRows, StreamRows
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Columns, Dense, Grid, LowRank, TrellisCodes, Weight, Where, shape
from llmcompress.weight.packing import stream_bits
from llmcompress.weight.trellis import cuts, states, table

NARROW = 1 << 15  # columns that int16 can number


# --- grids ----------------------------------------------------------------------------------------------------------


def grid_rows(w: Grid) -> GridRows:
    """Repack a grid."""
    rows, width = shape(w)
    bits, group = stream_bits(w.levels), min(w.group_size, width)
    widths = PLANES[bits]
    fields = WORD // widths[0]
    share = widths[0] // widths[-1]
    span = -(-group // (fields * share)) * share
    groups = -(-width // group)
    codes = torch.nn.functional.pad(w.codes, (0, groups * group - width)).reshape(rows, groups, group)
    codes = torch.nn.functional.pad(codes, (0, fields * span - group)).reshape(rows, groups, fields, span)
    codes = codes.transpose(2, 3)  # [rows, groups, words, fields]
    planes, low = [], 0
    for plane in widths:
        planes.append(_words((codes >> low) & ((1 << plane) - 1), plane).reshape(rows, -1))
        low += plane
    scale = w.scale.expand(rows, -1).contiguous()
    zero = None if w.zero is None else w.zero.expand(rows, -1).contiguous()
    return GridRows(tuple(planes), scale, zero, (rows, width), bits, w.levels, group, span)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., words, fields]` as int32 `[..., words of theirs]`, the first code in the lowest bits."""
    runs = codes.reshape(*codes.shape[:-2], -1, WORD // bits)
    words = torch.zeros(runs.shape[:-1], dtype=torch.int32, device=codes.device)
    for place in range(WORD // bits):
        words |= runs[..., place].int() << (bits * place)
    return words


def salient_rows(w: Where, dtype: torch.dtype) -> tuple[GridRows, SalientRows] | None:
    """Repack a grid with single weights in its place; None if the weights are no kind that is repacked."""
    if not isinstance(w.outside, Grid) or not isinstance(w.inside, Grid | Dense) or w.outside.codes.is_floating_point():
        return None
    size = shape(w)
    inside = w.index.inside.expand(size)
    background = grid_rows(replace(w.outside, codes=w.outside.codes.masked_fill(inside, 0)))
    counts = inside.sum(1)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    shared = isinstance(w.index, Columns)
    columns = (w.index.inside if shared else inside).nonzero()[:, -1]
    columns = columns.to(torch.int16 if size[1] <= NARROW else torch.int32)
    coded = isinstance(w.inside, Grid) and w.inside.zero is None and not w.inside.codes.is_floating_point()
    if isinstance(w.inside, Grid) and coded:
        numbers, levels = w.inside.codes[inside], w.inside.levels
        scale, group = w.inside.scale.expand(size[0], -1).contiguous(), min(w.inside.group_size, size[1])
    else:
        numbers, scale, levels, group = dense(w.inside)[inside].to(dtype), None, 1, size[1]
    most = int(counts.max())
    return background, SalientRows(starts, columns, numbers, scale, levels, group, shared, most)


# --- trellises ------------------------------------------------------------------------------------------------------


def stream_rows(w: TrellisCodes) -> StreamRows:
    """Repack the streams of a trellis."""
    (rows, width), trellis = shape(w), w.trellis
    words, units, above = [], [], 0
    for first, last in pairwise(cuts(rows, w.run, trellis)):
        codes = w.codes[first * width : last * width]
        ends = states(codes, trellis)[last - first - 1 :: last - first]  # of every column
        before = torch.nn.functional.pad(ends[:-1], (1, 0))
        own = _stream_words(codes.reshape(width, -1), trellis.bits)
        words += [before[None], own.T]
        for start in range(0, last - first, WORD):
            place = above + 1 + start // WORD * trellis.bits
            units.append((place, (first + start) * trellis.values, min(WORD, last - first - start) * trellis.values))
        above += 1 + own.shape[1]
    device = w.codes.device
    listed = torch.tensor(units, dtype=torch.int32, device=device)
    scale = w.scale[:, 0].float()
    packed = torch.cat(words).contiguous()
    numbers = table(trellis).to(device, torch.bfloat16)
    return StreamRows(packed, listed, scale, numbers, (rows, width), trellis.bits, trellis.values, trellis.memory)


def _stream_words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[columns, steps]` as int32 `[columns, words]`, the first in the highest bits; steps up to a whole unit."""
    octets = torch.nn.functional.pad(codes, (0, -codes.shape[1] % WORD)).reshape(len(codes), -1, 8).long()
    shifts = bits * torch.arange(7, -1, -1, device=codes.device)
    joined = (octets << shifts).sum(-1, keepdim=True)  # eight codes are `bits` bytes
    places = 8 * torch.arange(bits - 1, -1, -1, device=codes.device)
    found = ((joined >> places) & 255).reshape(len(codes), -1, 4)
    return (found << torch.tensor([24, 16, 8, 0], device=codes.device)).sum(-1).to(torch.int32)


# --- inputs and low rank --------------------------------------------------------------------------------------------


def turned(turns: tuple[InputChange, ...], factors: Tensor, block: int) -> tuple[InputChange, ...]:
    """Return the changes of inputs with one more; factors after factors are one change."""
    if turns and turns[-1].block == 1:
        return (*turns[:-1], InputChange(turns[-1].factors * factors, block))
    return (*turns, InputChange(factors, block))


def sign_factors(signs: Tensor, block: int) -> Tensor:
    """Return the factors of a rotation, float32 `[in]`."""
    return (signs.float() * 2 - 1) * block**-0.5


def low_rank_rows(w: LowRank, inputs: int, dtype: torch.dtype) -> LowRankRows:
    """Repack a low-rank term."""
    left, right = _numbers(w.left, dtype), _numbers(w.right, dtype)
    return LowRankRows(left, right, torch.zeros(len(left), dtype=torch.int32, device=left.device), inputs)


def _numbers(w: Weight, dtype: torch.dtype) -> Tensor:
    return dense(w).to(dtype).contiguous()
