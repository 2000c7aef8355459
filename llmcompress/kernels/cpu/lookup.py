"""Rows of prepared token tables, decoded a block at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.launch import BLOCK, Room, launch, of_inputs
from llmcompress.kernels.cpu.prefill import decoded_columns
from llmcompress.kernels.cpu.prepare import Basis, KernelTerm
from llmcompress.kernels.cpu.quantize_inputs import Inputs


def rows_of(term: KernelTerm, places: Sequence[int]) -> Tensor:
    """Return the rows at `places` of a matrix that one kernel multiplies by, float32 `[places, in]`."""
    packed, width = term.packed, term.packed.size[1]
    found = torch.empty(len(places), width)
    for row, place in zip(found, places):
        first = place // packed.form.block_rows * packed.form.block_rows
        row.copy_(decoded_columns(packed, first, first + packed.form.block_rows, torch.float32)[:width, place - first])
    found = found if term.basis.signs is None else _turned(term.basis, found)
    return found if term.basis.all_factors is None else found * term.basis.all_factors


def _turned(basis: Basis, rows: Tensor) -> Tensor:
    """Return rows in the basis that the rotation of inputs leads from, but for its factors."""
    room = Room.of(basis, BLOCK, len(rows), 0)
    kernel = build.loaded(Inputs(basis.width, BLOCK, basis.block, False, 0, False))
    launch(kernel, of_inputs(basis, rows.data_ptr(), room.addresses), len(rows), 0)
    return room.tensors[0][:, : basis.width]
