"""Products with prepared weights: of a few tokens by kernels, of many by decoding rows into torch's product."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.kernels.cpu.arguments import Argument
from llmcompress.kernels.cpu.build import Loaded, loaded
from llmcompress.kernels.cpu.dispatch import decoding_of, product_of
from llmcompress.kernels.cpu.layouts import KernelMatrix
from llmcompress.kernels.cpu.prepare import Basis, Chain, KernelTerm, PlainMatrix, Prepared, Scattered
from llmcompress.kernels.cpu.scattered import LANES, ListDecoding, ListProduct, Lists
from llmcompress.kernels.cpu.threads import team

Mode = Literal["auto", "exact", "int8"]
MODES: dict[str, Mode] = {"auto": "auto", "exact": "exact", "int8": "int8"}
NUMBERS: dict[Mode, int] = {"exact": 0, "int8": 1, "auto": 2}  # int8 for an input of a few tokens
FEW = 16  # tokens; from there on decoding once is cheaper than in every product
AT_ONCE = 2  # tokens of a kernel
WORTH_THREADS = 1 << 16  # weights, below which a team takes longer to wake
DECODED = 512  # rows that are decoded at a time, which stay in cache
BLOCK = 64  # columns of a block of inputs, where no kernel wants others
ROTATED = 128  # tokens that are rotated at a time
APART = 32  # numbers between their columns, or these would all lie in the same lines of a cache
Values = ctypes.c_int64 * len(Argument)


@dataclass(frozen=True, eq=False)
class _Ready:
    """Room for the inputs of some tokens in a basis: codes or floats, their scales, their sums, and the work itself."""

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @staticmethod
    def of(basis: Basis, block: int, tokens: int, numbers: int) -> _Ready:
        """Return room for so many tokens, in blocks of so many columns."""
        blocks = -(-basis.width // block)
        columns = blocks * block
        x = torch.empty(tokens, columns * max(numbers, 1), dtype=torch.int8 if numbers else torch.float32)
        tensors = (x, *(torch.empty(tokens, count) for count in (blocks, blocks, columns)))
        return _Ready(tensors, tuple(tensor.data_ptr() for tensor in tensors))


@dataclass
class _Known(threading.local):
    """The inputs that a thread had last, for the layers that share them; and room for one token, used again."""

    x: Tensor | None = None
    version: int = 0
    prepared: dict[object, _Ready] = field(default_factory=dict)
    turned: dict[object, Tensor] = field(default_factory=dict)
    room: dict[object, _Ready] = field(default_factory=dict)


_KNOWN = _Known()


def product(prepared: Prepared, x: Tensor, mode: Mode) -> Tensor:
    """Return `x [..., in] @ W.T` in the dtype of `x`; inputs of up to `FEW` tokens are rounded as `NUMBERS` says."""
    width = prepared.size[1]
    tokens = x.numel() // width
    version = -1 if x.is_inference() else x._version  # nobody counts changes of inference tensors
    if _KNOWN.x is not x or version < 0 or _KNOWN.version != version:
        _KNOWN.x, _KNOWN.version, _KNOWN.prepared, _KNOWN.turned = x, version, {}, {}
    if tokens > FEW:
        found = many(prepared, x.reshape(tokens, width), _KNOWN.turned)
        return found.reshape(*x.shape[:-1], prepared.size[0])
    single = prepared.single
    if tokens == 1 and single and single.basis.columns is None and x.dtype == torch.bfloat16 and x.is_contiguous():
        y = torch.empty((*x.shape[:-1], single.packed.rows), dtype=torch.bfloat16)
        _one(single, x, y, NUMBERS[mode])
        return y if single.packed.rows == prepared.size[0] else y[..., : prepared.size[0]]
    found = few(prepared, x.reshape(tokens, width), NUMBERS[mode], _KNOWN.prepared)
    return found.to(x.dtype).reshape(*x.shape[:-1], prepared.size[0])


@dataclass(frozen=True, eq=False)
class _OneToken:
    """All that does not change between products of one token in bfloat16, the way that most of generating takes."""

    key: object
    prepare: Any  # the kernels
    multiply: Loaded
    inputs: Any  # their arguments, but for x and y
    matrix: Any
    ready: _Ready
    blocks: int
    weights: int


def _one(term: KernelTerm, x: Tensor, y: Tensor, numbers: int) -> None:
    """Write the product of one token."""
    mine = (threading.get_ident(), numbers)
    fixed = term.ones.get(mine)
    if fixed is None:
        fixed = term.ones[mine] = _one_token(term, numbers)
    known = _KNOWN.prepared
    if known.get(fixed.key) is not fixed.ready:
        known[fixed.key] = fixed.ready
        fixed.inputs[Argument.CODES] = x.data_ptr()
        fixed.prepare(ctypes.addressof(fixed.inputs), 0, 1)
    fixed.matrix[Argument.Y] = y.data_ptr()
    _run(fixed.multiply, fixed.matrix, fixed.blocks, fixed.weights)


def _one_token(term: KernelTerm, numbers: int) -> _OneToken:
    basis, packed, numbers = term.basis, term.packed, term.numbers(numbers)
    key = (basis.name, term.block, numbers, 1)
    if key not in _KNOWN.room:
        _KNOWN.room[key] = _Ready.of(basis, term.block, 1, numbers)
    ready = _KNOWN.room[key]
    return _OneToken(
        key,
        loaded(basis.inputs(term.block, numbers, True)).serial,
        loaded(product_of(packed.form, 1, numbers, True)),
        _of_inputs(basis, 0, ready.addresses),
        _of_product(packed, ready.addresses[:3], 0),
        ready,
        packed.rows // packed.form.block_rows,
        packed.rows * packed.columns,
    )


def few(prepared: Prepared, x: Tensor, numbers: int, known: dict[object, _Ready]) -> Tensor:
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


def _by_kernel(term: KernelTerm, x: Tensor, y: Tensor | None, numbers: int, known: dict[object, _Ready]) -> Tensor:
    """Return `y` plus the product of a term: float32 with at least as many rows and columns as wanted."""
    packed, numbers = term.packed, term.numbers(numbers)
    ready = _ready(term.basis, term.block, x, numbers, known)
    tokens = len(ready.tensors[0])
    if y is None or y.shape != (tokens, packed.rows):
        before, y = y, torch.zeros(tokens, packed.rows)
        if before is not None:
            size = min(tokens, len(before)), min(packed.rows, before.shape[1])
            y[: size[0], : size[1]] += before[: size[0], : size[1]]
    kernel = loaded(product_of(packed.form, max(1, min(tokens, AT_ONCE)), numbers, False))
    for first in range(0, tokens, AT_ONCE):
        _multiply(kernel, packed, ready, first, y[first:].data_ptr())
    return y


def _by_lists(term: Scattered, x: Tensor, known: dict[object, _Ready]) -> Tensor:
    """Return the product of a few tokens with elements in lists, of which more rows and tokens may come than wanted."""
    ready = _ready(term.basis, BLOCK, x, 0, known)
    held, (tokens, columns) = term.lists, ready.tensors[0].shape
    kernel = loaded(ListProduct(held.kind, min(tokens, AT_ONCE)))
    y = torch.empty(tokens, LANES * held.tiles)
    for first in range(0, tokens, AT_ONCE):
        inputs = ready.tensors[0][first].data_ptr()
        matrix = (held.steps.data_ptr(), held.heads.data_ptr(), held.starts.data_ptr())
        values = Values(*matrix, inputs, 0, 0, y[first].data_ptr(), columns, y.shape[1])
        _run(kernel, values, held.tiles, LANES * held.steps.numel())
    return y[: len(x), : held.size[0]]


def _ready(basis: Basis, block: int, x: Tensor, numbers: int, known: dict[object, _Ready]) -> _Ready:
    """Return a few tokens in a basis, those of `known` where they are there; zeros fill whole kernels of tokens."""
    tokens = 1 if len(x) == 1 else -(-len(x) // AT_ONCE) * AT_ONCE
    key = (basis.name, block, numbers, tokens)
    if key not in known:
        known[key] = _inputs(basis, block, x, tokens, numbers)
    return known[key]


def _inputs(basis: Basis, block: int, x: Tensor, tokens: int, numbers: int) -> _Ready:
    """Return inputs in a basis, with zeros behind them up to so many tokens."""
    ready = _Ready.of(basis, block, tokens, numbers)
    rows = x if basis.columns is None else x[..., basis.columns]
    bfloat16 = rows.dtype == torch.bfloat16
    rows = rows.contiguous() if bfloat16 else rows.float().contiguous()
    if tokens > 1 and tokens > len(rows):
        rows = torch.cat([rows, rows.new_zeros(tokens - len(rows), basis.width)])
    values = _of_inputs(basis, rows.data_ptr(), ready.addresses)
    loaded(basis.inputs(block, numbers, bfloat16)).serial(ctypes.addressof(values), 0, tokens)
    return ready


def _multiply(kernel: Loaded, packed: KernelMatrix, ready: _Ready, first: int, y: int) -> None:
    """Write the product of prepared inputs from token `first` on to the address `y`."""
    inputs = ready.addresses[:3] if not first else tuple(tensor[first:].data_ptr() for tensor in ready.tensors[:3])
    _run(kernel, _of_product(packed, inputs, y), packed.rows // packed.form.block_rows, packed.rows * packed.columns)


def _of_inputs(basis: Basis, x: int, addresses: tuple[int, ...]) -> Any:
    """Return the arguments of the kernel of inputs; `addresses`: of codes, scales, sums, and room to work in."""
    factors = basis.all_factors
    return Values(x, 0 if factors is None else factors.data_ptr(), 0, *addresses)


def _of_product(packed: KernelMatrix, inputs: tuple[int, ...], y: int) -> Any:
    """Return the arguments of a product; `inputs`: the addresses of codes, scales and sums."""
    return Values(*packed.addresses, *inputs, y, packed.columns, packed.rows, packed.groups, packed.table_address)


def _run(kernel: Loaded, values: Any, blocks: int, weights: int) -> None:
    """Run a kernel over all blocks of rows, by torch's threads where that pays."""
    threads = min(torch.get_num_threads(), blocks) if weights >= WORTH_THREADS else 1
    found = team() if threads > 1 else None
    if found is None:
        kernel.serial(ctypes.addressof(values), 0, blocks)
        return
    values[Argument.BLOCKS] = blocks
    values[Argument.THREADS], values[Argument.THREAD] = found.count, found.number
    found.parallel(kernel.parallel, ctypes.addressof(values), threads, 0)


# --- many tokens ----------------------------------------------------------------------------------------------------


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
    """Return many tokens in a rotated basis, some at a time."""
    x = x if basis.columns is None else x[:, basis.columns]
    bfloat16, found = x.dtype == torch.bfloat16, torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel = loaded(basis.inputs(BLOCK, 0, bfloat16))
    blocks = -(-basis.width // BLOCK)
    for rows, y in zip(x.split(ROTATED), found.split(ROTATED)):
        rows = rows.contiguous() if bfloat16 else rows.float().contiguous()
        work, total = torch.empty(2, len(rows), blocks * BLOCK), torch.empty(len(rows), blocks)
        room = work[0].data_ptr(), 0, total.data_ptr(), work[1].data_ptr()
        values = _of_inputs(basis, rows.data_ptr(), room)
        _run(kernel, values, len(rows), rows.numel())
        y.copy_(work[0, :, : basis.width])
    return found


def _through_tiles(packed: KernelMatrix, x: Tensor) -> Tensor:
    """Return the product with a packed matrix, decoded some rows at a time."""
    rows, block_rows = packed.size[0], packed.form.block_rows
    y = x.new_empty(len(x), rows)
    at_once = DECODED // block_rows * block_rows
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
    at_once = DECODED // LANES
    kernel = loaded(ListDecoding(held.kind, bfloat16))
    for first in range(0, held.tiles, at_once):
        last = min(first + at_once, held.tiles)
        tile = torch.zeros(LANES * (last - first), width + 1, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        places = held.steps.data_ptr(), held.heads[first].data_ptr(), held.starts[first:].data_ptr()
        _run(kernel, Values(*places, 0, 0, 0, tile.data_ptr(), width + 1), last - first, tile.numel())
        y[:, order[LANES * first : LANES * last]] = torch.nn.functional.linear(x, tile[:, :width].to(x.dtype))
    return y[:, :rows]


def decoded_columns(packed: KernelMatrix, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows of a packed matrix from one block to another, transposed: `[columns, last - first]`."""
    bfloat16 = dtype == torch.bfloat16
    y = torch.empty(packed.decoded_columns, last - first + APART, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    matrix, scales, zeros = packed.addresses
    block = first // packed.form.block_rows
    tiles = block * (packed.form.block_rows * packed.form.columns // 64) * packed.groups * 16
    places = matrix + block * packed.block_bytes, scales + 2 * tiles, zeros and zeros + tiles
    values = Values(*places, 0, 0, 0, y.data_ptr(), packed.columns, y.shape[1], packed.groups, packed.table_address)
    _run(loaded(decoding_of(packed.form, bfloat16)), values, (last - first) // packed.form.block_rows, y.numel())
    y = y[:, : last - first]
    return y if y.dtype == dtype else y.to(dtype)
