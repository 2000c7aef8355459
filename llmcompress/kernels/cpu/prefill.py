"""Products of many tokens: weights are decoded, some rows at a time, into torch's product."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.dispatch import decoding_of
from llmcompress.kernels.cpu.launch import BLOCK, Values, launch, of_inputs
from llmcompress.kernels.cpu.layouts import KernelMatrix
from llmcompress.kernels.cpu.prepare import Basis, Chain, KernelTerm, PlainMatrix, Prepared, Scattered
from llmcompress.kernels.cpu.scattered import LANES, ListDecoding, Lists

DECODED = 1 << 20  # weights that are decoded at a time, which stay in cache
APART = 32  # numbers between their columns, or these would all lie in the same lines of a cache


@dataclass
class _Known(threading.local):
    """Room of a thread for decoded rows, which is used again: new memory costs as much as to decode into it."""

    tile: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def room(self, columns: int, stride: int, kind: torch.dtype) -> Tensor:
        """Return room `[columns, stride]`, until somebody else asks."""
        count = columns * stride * kind.itemsize
        if self.tile.numel() < count:
            self.tile = torch.empty(count, dtype=torch.uint8)
        return self.tile[:count].view(kind).view(columns, stride)


_KNOWN = _Known()


def many(prepared: Prepared, x: Tensor, turned: dict[object, Tensor]) -> Tensor:
    """Return the product of many tokens `[tokens, in]`, by torch, in the dtype of `x`; `turned`: it in other bases."""
    y: Tensor | None = None
    for term in prepared.terms:
        match term:
            case KernelTerm(basis, packed):
                more = _through_tiles(packed, _in_basis(basis, x, turned))
            case Chain(left, right):
                more = many(left, many(right, x, turned), {})
            case PlainMatrix(basis, values):
                more = torch.nn.functional.linear(_in_basis(basis, x, turned), values.to(x.dtype))
            case Scattered(basis, held):
                more = _through_lists(held, _in_basis(basis, x, turned))
        y = more if y is None else y.add_(more)
    return x.new_zeros(len(x), prepared.size[0]) if y is None else y


def _in_basis(basis: Basis, x: Tensor, turned: dict[object, Tensor]) -> Tensor:
    """Return many tokens in a basis, by the kernel where they are to be rotated."""
    found = turned.get(basis.name)
    if found is None:
        found = basis.apply(x) if basis.signs is None else _rotated(basis, x)
        turned[basis.name] = found
    return found


def _rotated(basis: Basis, x: Tensor) -> Tensor:
    """Return many tokens in a rotated basis."""
    x, dtype = x if basis.columns is None else x[:, basis.columns], x.dtype
    bfloat16, blocks = dtype == torch.bfloat16, -(-basis.width // BLOCK)
    x = x.contiguous() if bfloat16 else x.float().contiguous()
    found = torch.empty(len(x), blocks * BLOCK, dtype=x.dtype)
    work, total = torch.empty(len(x), blocks * BLOCK), torch.empty(len(x), blocks)
    values = of_inputs(basis, x.data_ptr(), (found.data_ptr(), 0, total.data_ptr(), work.data_ptr()))
    launch(build.loaded(basis.inputs(BLOCK, 0, bfloat16, rounded=bfloat16)), values, len(x), x.numel())
    return found[:, : basis.width].to(dtype)


def _through_tiles(packed: KernelMatrix, x: Tensor) -> Tensor:
    """Return the product with a packed matrix, decoded some rows at a time."""
    rows, block_rows = packed.size[0], packed.form.block_rows
    y = x.new_empty(len(x), rows)
    tiles = -(-packed.rows * packed.decoded_columns // DECODED)
    at_once = -(-packed.rows // (tiles * block_rows)) * block_rows
    for first in range(0, packed.rows, at_once):
        last = min(first + at_once, packed.rows)
        tile = decoded_columns(packed, first, last, x.dtype)[: packed.size[1], : rows - first]
        torch.mm(x, tile, out=y[:, first : min(last, rows)])
    return y


def _through_lists(held: Lists, x: Tensor) -> Tensor:
    """Return the product with elements in lists, decoded some rows at a time."""
    bfloat16, (rows, width) = x.dtype == torch.bfloat16, held.size
    y = x.new_empty(len(x), LANES * held.tiles)
    order = held.heads[:, 2].reshape(-1)
    at_once = -(-DECODED // (LANES * width))
    kernel = build.loaded(ListDecoding(held.kind, bfloat16))
    for first in range(0, held.tiles, at_once):
        last = min(first + at_once, held.tiles)
        tile = torch.zeros(LANES * (last - first), width + 1, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        places = held.steps.data_ptr(), held.heads[first].data_ptr(), held.starts[first:].data_ptr()
        launch(kernel, Values(*places, 0, 0, 0, tile.data_ptr(), width + 1), last - first, tile.numel())
        y[:, order[LANES * first : LANES * last]] = torch.nn.functional.linear(x, tile[:, :width].to(x.dtype))
    return y[:, :rows]


def decoded_columns(packed: KernelMatrix, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows of a packed matrix from one block to another, transposed: `[columns, last - first]`.

    They are there until the thread decodes again.
    """
    bfloat16 = dtype == torch.bfloat16
    y = _KNOWN.room(packed.decoded_columns, last - first + APART, torch.bfloat16 if bfloat16 else torch.float32)
    matrix, scales, zeros = packed.addresses
    block = first // packed.form.block_rows
    tiles = block * (packed.form.block_rows * packed.form.columns // 64) * packed.groups * 16
    places = matrix + block * packed.block_bytes, scales + 2 * tiles, zeros and zeros + tiles
    values = Values(*places, 0, 0, 0, y.data_ptr(), packed.columns, y.shape[1], packed.groups, packed.table_address)
    launch(
        build.loaded(decoding_of(packed.form, bfloat16)), values, (last - first) // packed.form.block_rows, y.numel()
    )
    y = y[:, : last - first]
    return y if y.dtype == dtype else y.to(dtype)
