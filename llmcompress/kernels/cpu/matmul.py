"""Products with prepared weights: of a few tokens by kernels, of many by decoding rows into torch's product."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.decode import one_token
from llmcompress.kernels.cpu.dispatch import product_of
from llmcompress.kernels.cpu.launch import BLOCK, Room, Values, launch, of_inputs, of_product
from llmcompress.kernels.cpu.layouts import KernelMatrix
from llmcompress.kernels.cpu.prefill import many
from llmcompress.kernels.cpu.prepare import Basis, Chain, KernelTerm, PlainMatrix, Prepared, Scattered
from llmcompress.kernels.cpu.scattered import LANES, ListProduct

Mode = Literal["auto", "exact", "int8"]
MODES: dict[str, Mode] = {"auto": "auto", "exact": "exact", "int8": "int8"}
NUMBERS: dict[Mode, int] = {"exact": 0, "int8": 1, "auto": 2}  # int8 for an input of a few tokens
FEW = 16  # tokens; from there on decoding once is cheaper than in every product
FEW_FLOATS = 6  # tokens of weights that are looked up as floats
AT_ONCE = 2  # tokens of a kernel


@dataclass
class _Known(threading.local):
    """The inputs that a thread had last, for the layers that share them."""

    x: Tensor | None = None
    version: int = 0
    copy: Tensor | None = None  # of inference tensors, whose changes nobody counts
    prepared: dict[object, Room] = field(default_factory=dict)
    turned: dict[object, Tensor] = field(default_factory=dict)

    def see(self, x: Tensor) -> None:
        """Forget what is known unless these are the last inputs, unchanged."""
        if self.x is x and (self.version == x._version if self.copy is None else torch.equal(x, self.copy)):
            return
        self.x, self.prepared, self.turned = x, {}, {}
        if x.is_inference():
            self.copy = x.clone()
        else:
            self.version, self.copy = x._version, None


_KNOWN = _Known()


def product(prepared: Prepared, x: Tensor, mode: Mode) -> Tensor:
    """Return `x [..., in] @ W.T` in the dtype of `x`; inputs of a few tokens are rounded as `NUMBERS` says."""
    rows, width = prepared.size
    count = x.numel()
    if count == width and prepared.plain is not None and x.dtype == torch.bfloat16 and x.is_contiguous():
        y = one_token(prepared.plain, x, NUMBERS[mode])
        return y if y.shape[-1] == rows else y[..., :rows]
    tokens = count // width
    _KNOWN.see(x)
    if tokens > (FEW_FLOATS if prepared.takes_floats else FEW):
        return many(prepared, x.reshape(tokens, width), _KNOWN.turned).reshape(*x.shape[:-1], rows)
    found = few(prepared, x.reshape(tokens, width), NUMBERS[mode], _KNOWN.prepared)
    return found.to(x.dtype).reshape(*x.shape[:-1], rows)


def few(prepared: Prepared, x: Tensor, numbers: int, known: dict[object, Room]) -> Tensor:
    """Return the product of a few tokens, float32 `[tokens, out]`; `known`: inputs that were prepared of this `x`."""
    y: Tensor | None = None
    for term in prepared.terms:
        match term:
            case KernelTerm():
                y = _by_kernel(term, x, y, numbers, known)
            case Chain(left, right):
                y = _added(y, few(left, few(right, x, numbers, known), numbers, {}))
            case PlainMatrix(basis, values):
                inputs = basis.apply(x)
                y = _added(y, torch.nn.functional.linear(inputs, values.to(inputs.dtype)).float())
            case Scattered():
                y = _added(y, _by_lists(term, x, known))
    y = x.new_zeros(len(x), prepared.size[0], dtype=torch.float32) if y is None else y
    return y[: len(x), : prepared.size[0]]


def _added(y: Tensor | None, more: Tensor) -> Tensor:
    if y is None:
        return more
    y[: len(more), : more.shape[1]] += more
    return y


def _by_kernel(term: KernelTerm, x: Tensor, y: Tensor | None, numbers: int, known: dict[object, Room]) -> Tensor:
    """Return `y` plus the product of a term: float32 with at least as many rows and columns as wanted."""
    packed, numbers = term.packed, term.numbers(numbers)
    ready = _ready(term.basis, term.block, x, numbers, known)
    tokens = len(ready.tensors[0])
    if y is None or y.shape != (tokens, packed.rows):
        before, y = y, torch.zeros(tokens, packed.rows)
        if before is not None:
            size = min(tokens, len(before)), min(packed.rows, before.shape[1])
            y[: size[0], : size[1]] += before[: size[0], : size[1]]
    kernel = build.loaded(product_of(packed.form, max(1, min(tokens, AT_ONCE)), numbers, False))
    for first in range(0, tokens, AT_ONCE):
        _multiply(kernel, packed, ready, first, y[first:].data_ptr())
    return y


def _by_lists(term: Scattered, x: Tensor, known: dict[object, Room]) -> Tensor:
    """Return the product of a few tokens with elements in lists, of which more rows and tokens may come than wanted."""
    ready = _ready(term.basis, BLOCK, x, 0, known)
    held, (tokens, columns) = term.lists, ready.tensors[0].shape
    kernel = build.loaded(ListProduct(held.kind, min(tokens, AT_ONCE)))
    y = torch.empty(tokens, LANES * held.tiles)
    for first in range(0, tokens, AT_ONCE):
        inputs = ready.tensors[0][first].data_ptr()
        matrix = (held.steps.data_ptr(), held.heads.data_ptr(), held.starts.data_ptr())
        values = Values(*matrix, inputs, 0, 0, y[first].data_ptr(), columns, y.shape[1])
        launch(kernel, values, held.tiles, LANES * held.steps.numel())
    return y[: len(x), : held.size[0]]


def _ready(basis: Basis, block: int, x: Tensor, numbers: int, known: dict[object, Room]) -> Room:
    """Return a few tokens in a basis, those of `known` where they are there; zeros fill whole kernels of tokens."""
    tokens = 1 if len(x) == 1 else -(-len(x) // AT_ONCE) * AT_ONCE
    key = (basis.name, block, numbers, tokens)
    if key not in known:
        known[key] = _inputs(basis, block, x, tokens, numbers)
    return known[key]


def _inputs(basis: Basis, block: int, x: Tensor, tokens: int, numbers: int) -> Room:
    """Return inputs in a basis, with zeros behind them up to so many tokens."""
    ready = Room.of(basis, block, tokens, numbers)
    rows = x if basis.columns is None else x[..., basis.columns]
    bfloat16 = rows.dtype == torch.bfloat16
    rows = rows.contiguous() if bfloat16 else rows.float().contiguous()
    if tokens > 1 and tokens > len(rows):
        rows = torch.cat([rows, rows.new_zeros(tokens - len(rows), basis.width)])
    values = of_inputs(basis, rows.data_ptr(), ready.addresses)
    build.loaded(basis.inputs(block, numbers, bfloat16)).serial(ctypes.addressof(values), 0, tokens)
    return ready


def _multiply(kernel: build.Loaded, packed: KernelMatrix, ready: Room, first: int, y: int) -> None:
    """Write the product of prepared inputs from token `first` on to the address `y`."""
    inputs = ready.addresses[:3] if not first else tuple(tensor[first:].data_ptr() for tensor in ready.tensors[:3])
    launch(kernel, of_product(packed, inputs, y), packed.rows // packed.form.block_rows, packed.rows * packed.columns)
