"""Products of many tokens: weights are decoded, some rows at a time, into torch's product. Single rows for lookups."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.calls import Values, launch
from llmcompress.kernels.cpu.emit import LANES
from llmcompress.kernels.cpu.layouts import KernelMatrix
from llmcompress.kernels.cpu.prepare import Basis, Chain, KernelTerm, PlainMatrix, PreparedWeight, ScatteredMatrix
from llmcompress.kernels.cpu.quantize_inputs import BLOCK, InputBuffers, Inputs, input_values
from llmcompress.kernels.cpu.scattered import ElementLists, ListDecoding

DECODED = 1 << 20  # weights decoded at a time, which stay in cache
APART = 32  # numbers between their columns, or these would all lie in the same lines of a cache


@dataclass
class _TileBuffer(threading.local):
    """A thread's memory for decoded rows, used again: new memory costs as much as decoding into it."""

    tile: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8, device="cpu"))

    def view(self, columns: int, stride: int, kind: torch.dtype) -> Tensor:
        """Return memory `[columns, stride]`, valid until the next call."""
        count = columns * stride * kind.itemsize
        if self.tile.numel() < count:
            self.tile = self.tile.new_empty(count)
        return self.tile[:count].view(kind).view(columns, stride)


_BUFFER = _TileBuffer()


def multiply_many(prepared: PreparedWeight, x: Tensor, turned: dict[object, Tensor]) -> Tensor:
    """Return the product of many tokens `[tokens, in]`, by torch, in the dtype of `x`; `turned`: it in other bases."""
    y: Tensor | None = None
    for term in prepared.terms:
        match term:
            case KernelTerm(basis, packed):
                more = _multiply_tiles(packed, _change_basis(basis, x, turned))
            case Chain(left, right):
                more = multiply_many(left, multiply_many(right, x, turned), {})
            case PlainMatrix(basis, values):
                more = torch.nn.functional.linear(_change_basis(basis, x, turned), values.to(x.dtype))
            case ScatteredMatrix(basis, lists):
                more = _multiply_lists(lists, _change_basis(basis, x, turned))
        y = more if y is None else y.add_(more)
    return x.new_zeros(len(x), prepared.size[0]) if y is None else y


def _change_basis(basis: Basis, x: Tensor, turned: dict[object, Tensor]) -> Tensor:
    """Return many tokens in a basis, by the kernel if it rotates them."""
    if basis.name not in turned:
        turned[basis.name] = basis.apply(x) if basis.signs is None else _rotate_inputs(basis, x)
    return turned[basis.name]


def _rotate_inputs(basis: Basis, x: Tensor) -> Tensor:
    """Return many tokens in a rotated basis."""
    x, dtype = x if basis.columns is None else x[:, basis.columns], x.dtype
    bfloat16, blocks = dtype == torch.bfloat16, -(-basis.width // BLOCK)
    x = x.contiguous() if bfloat16 else x.float().contiguous()
    y = x.new_empty(len(x), blocks * BLOCK)
    work, total = (x.new_empty(len(x), count, dtype=torch.float32) for count in (blocks * BLOCK, blocks))
    addresses = (y.data_ptr(), 0, total.data_ptr(), work.data_ptr())
    values = input_values(basis.all_factors, x.data_ptr(), addresses)
    launch(build.load_kernel(basis.inputs(BLOCK, 0, bfloat16, rounded=bfloat16)), values, len(x), x.numel())
    return y[:, : basis.width].to(dtype)


def _multiply_tiles(packed: KernelMatrix, x: Tensor) -> Tensor:
    """Return the product with a packed matrix, decoded some rows at a time."""
    rows, block_rows = packed.size[0], packed.form.block_rows
    y = x.new_empty(len(x), rows)
    tiles = -(-packed.rows * packed.decoded_columns // DECODED)
    at_once = -(-packed.rows // (tiles * block_rows)) * block_rows
    for first in range(0, packed.rows, at_once):
        last = min(first + at_once, packed.rows)
        tile = decode_columns(packed, first, last, x.dtype)[: packed.size[1], : rows - first]
        torch.mm(x, tile, out=y[:, first : min(last, rows)])
    return y


def _multiply_lists(lists: ElementLists, x: Tensor) -> Tensor:
    """Return the product with elements in lists, decoded some rows at a time."""
    bfloat16, (rows, width) = x.dtype == torch.bfloat16, lists.size
    y = x.new_empty(len(x), LANES * lists.tiles)
    order = lists.heads[:, 2].reshape(-1)
    at_once = -(-DECODED // (LANES * width))
    kernel = build.load_kernel(ListDecoding(lists.kind, bfloat16))
    for first in range(0, lists.tiles, at_once):
        last = min(first + at_once, lists.tiles)
        tile = x.new_zeros(LANES * (last - first), width + 1, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        places = lists.steps.data_ptr(), lists.heads[first].data_ptr(), lists.starts[first:].data_ptr()
        launch(kernel, Values(*places, 0, 0, 0, tile.data_ptr(), width + 1), last - first, tile.numel())
        y[:, order[LANES * first : LANES * last]] = torch.nn.functional.linear(x, tile[:, :width].to(x.dtype))
    return y[:, :rows]


def decode_columns(packed: KernelMatrix, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows of a packed matrix from one block to another, transposed: `[columns, last - first]`.

    Valid until the thread decodes again.
    """
    bfloat16 = dtype == torch.bfloat16
    y = _BUFFER.view(packed.decoded_columns, last - first + APART, torch.bfloat16 if bfloat16 else torch.float32)
    matrix, scales, zeros = packed.addresses
    block = first // packed.form.block_rows
    tiles = block * (packed.form.block_rows * packed.form.columns // 64) * packed.groups * 16
    places = matrix + block * packed.block_bytes, scales + 2 * tiles, zeros and zeros + tiles
    values = Values(*places, 0, 0, 0, y.data_ptr(), packed.columns, y.shape[1], packed.groups, packed.table_address)
    launch(build.load_kernel(packed.decoding(bfloat16)), values, (last - first) // packed.form.block_rows, y.numel())
    y = y[:, : last - first]
    return y if y.dtype == dtype else y.to(dtype)


def decode_rows(term: KernelTerm, places: Sequence[int]) -> Tensor:
    """Return the rows at `places` of a matrix that one kernel multiplies by, float32 `[places, in]`."""
    packed, basis, width = term.packed, term.basis, term.packed.size[1]
    rows = packed.codes.new_empty(len(places), width, dtype=torch.float32)
    for row, place in zip(rows, places):
        first = place // packed.form.block_rows * packed.form.block_rows
        row.copy_(decode_columns(packed, first, first + packed.form.block_rows, torch.float32)[:width, place - first])
    if basis.signs is not None:  # the rotation of inputs is its own inverse
        buffers = InputBuffers.allocate(basis.width, BLOCK, len(rows), 0)
        kernel = build.load_kernel(Inputs(basis.width, BLOCK, basis.block, False, 0, False))
        launch(kernel, input_values(basis.all_factors, rows.data_ptr(), buffers.addresses), len(rows), 0)
        rows = buffers.tensors[0][:, : basis.width]
    return rows if basis.all_factors is None else rows * basis.all_factors
