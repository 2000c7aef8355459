"""Stored weights repacked for kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.kernels.cpu.formats import Format, Planes, Streams
from llmcompress.kernels.cpu.product import LANES, block_size, shares
from llmcompress.weight.linear_code import linear_code
from llmcompress.weight.nodes import Grid, TrellisCoded, Weight, shape
from llmcompress.weight.trellis import cuts

BEFORE = 2  # units before a block that windows may reach into
SLACK = 64  # bytes that a kernel may read behind the last code
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix `[out, in]` in the form of kernels; `rows` and `columns` are rounded up to whole blocks."""

    form: Format
    size: tuple[int, int]
    rows: int
    columns: int
    groups: int
    codes: Tensor  # uint8, flat
    scales: Tensor  # float16 [row tiles, groups, 16]
    zeros: Tensor | None  # uint8, alike

    @property
    def bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros) if part is not None)


def packed(w: Weight) -> Packed | None:
    """Return a matrix repacked; None if no kernel reads its form."""
    match w:
        case Grid():
            return _grid(w)
        case TrellisCoded():
            return _streams(w)
    return None


def _grid(w: Grid) -> Packed | None:
    rows, width = w.codes.shape
    group = 0 if w.group_size >= width else w.group_size
    if group % 32 or w.levels > 256:
        return None
    bits = max(1, (w.levels - 1).bit_length())
    form = Planes(bits, group, w.zero is not None, (w.levels - 1) / 2)
    padded_rows, columns = _up(rows, LANES), _up(width, block_size(form))
    codes = np.zeros((padded_rows, columns), np.uint8)
    codes[:rows, :width] = w.codes.numpy()
    groups = w.scale.shape[1]
    scales = _by_tile(form, w.scale.expand(rows, groups), padded_rows)
    zeros = None if w.zero is None else _by_tile(form, w.zero.expand(rows, groups), padded_rows)
    return Packed(form, (rows, width), padded_rows, columns, groups, _held(_planes(codes, form)), scales, zeros)


def _planes(codes: Bytes, form: Planes) -> Bytes:
    """Return codes `[rows, columns]` as `Planes` describes them."""
    tiles, spans = codes.shape[0] // LANES, codes.shape[1] // 32
    found, left = [], form.bits
    for width in form.planes:
        left -= width
        part = (codes >> left) & ((1 << width) - 1)
        ordered = part.reshape(tiles, LANES, spans, width, 8 // width, 4).transpose(0, 2, 3, 1, 5, 4)
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        found.append((ordered << shifts).sum(-1, dtype=np.uint8).reshape(tiles, spans, width, 64))
    return np.concatenate(found, 2)


def _streams(w: TrellisCoded) -> Packed | None:
    rows, width = shape(w)
    trellis = w.trellis
    if trellis.code != "linear":
        return None
    code = linear_code(trellis.bits, trellis.values, trellis.memory)
    numbers = tuple(tuple(part.tolist()) for part in code.numbers)
    form = Streams(trellis.bits, trellis.values, trellis.memory, code.masks, numbers)
    if any(stop - start > 0 and start % form.block_rows for start, stop in pairwise((*range(0, rows, w.run), rows))):
        return None
    padded_rows, columns = _up(rows, form.block_rows), _up(width, block_size(form))
    blocks = []
    for first, last in pairwise(cuts(rows, w.run, trellis)):
        stream = w.codes[first * width : last * width].numpy()
        for start in range(0, last - first, form.units * form.phases):
            blocks.append(_block(_history_and_codes(stream, last - first, start, form, columns), form))
    scales = _by_tile(form, w.scale, padded_rows)
    return Packed(form, (rows, width), padded_rows, columns, 1, _held(np.stack(blocks)), scales, None)


def _history_and_codes(stream: Bytes, steps: int, start: int, form: Streams, columns: int) -> Bytes:
    """Return bytes of a block of every column, `[columns, units, unit_bytes]`, two units before it among them."""
    first = start - BEFORE * form.phases
    places = np.arange(columns)[:, None] * steps + np.arange(first, start + form.units * form.phases)
    codes = stream[places.clip(0, len(stream) - 1)] * (places >= 0)
    bits = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1)[..., 8 - form.bits :]
    return np.packbits(bits.reshape(columns, -1), axis=1).reshape(columns, BEFORE + form.units, form.unit_bytes)


def _block(held: Bytes, form: Streams) -> Bytes:
    """Return a block as `Streams` describes it, `[columns / form.columns, bytes]`."""
    together = held.reshape(-1, form.columns, BEFORE + form.units, form.unit_bytes)
    planes = [
        together[:, :, BEFORE - form.history(plane) :, plane].transpose(0, 2, 1).reshape(len(together), -1)
        for plane in range(form.unit_bytes)
    ]
    return np.concatenate(planes, 1)


def _by_tile(form: Format, values: Tensor, rows: int) -> Tensor:
    """Return numbers `[out, groups]` by the lanes of tiles: `[tiles, groups, 16]`, 0 for rows that are not."""
    full = torch.zeros(rows, values.shape[1], dtype=values.dtype)
    full[: len(values)] = values
    ordered = full.reshape(-1, form.block_rows, values.shape[1])[:, form.order]
    lanes = ordered.repeat_interleave(shares(form), 1).reshape(-1, LANES, values.shape[1])
    return lanes.transpose(1, 2).contiguous()


def _held(codes: Bytes) -> Tensor:
    """Return bytes with what kernels may read behind them."""
    return torch.from_numpy(np.concatenate([codes.reshape(-1), np.zeros(SLACK, np.uint8)]))


def _up(count: int, size: int) -> int:
    return -(-count // size) * size
