"""Products with prepared weights: of a few tokens by kernels, of many by decoding rows into torch's product."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.calls import Argument, LoadedKernel, Values, launch
from llmcompress.kernels.cpu.emit import LANES
from llmcompress.kernels.cpu.prefill import multiply_many
from llmcompress.kernels.cpu.prepare import Basis, Chain, KernelTerm, PlainMatrix, PreparedWeight, ScatteredMatrix
from llmcompress.kernels.cpu.quantize_inputs import BLOCK, InputBuffers, input_values
from llmcompress.kernels.cpu.scattered import ListProduct

Mode = Literal["auto", "exact", "int8"]
MODES: dict[str, Mode] = {"auto": "auto", "exact": "exact", "int8": "int8"}
NUMBERS: dict[Mode, int] = {"exact": 0, "int8": 1, "auto": 2}  # int8 for an input of a few tokens
FEW = 16  # tokens; from there on decoding once is cheaper than in every product
FEW_FLOATS = 6  # tokens, for weights that are looked up as floats
AT_ONCE = 2  # tokens of a kernel
INPUTS, OUTPUTS = int(Argument.CODES), int(Argument.Y)  # the arguments that change between products of one token


@dataclass
class _InputCache(threading.local):
    """The last inputs of a thread, for the layers that share them."""

    x: Tensor | None = None
    version: int = 0
    copy: Tensor | None = None  # of inference tensors, whose changes nobody counts
    prepared: dict[object, InputBuffers] = field(default_factory=dict)
    turned: dict[object, Tensor] = field(default_factory=dict)

    def remember(self, x: Tensor) -> None:
        """Forget the last inputs unless these are the same, unchanged."""
        if self.x is x and (self.version == x._version if self.copy is None else torch.equal(x, self.copy)):
            return
        self.x, self.prepared, self.turned = x, {}, {}
        if x.is_inference():
            self.copy = x.clone()
        else:
            self.version, self.copy = x._version, None


_CACHE = _InputCache()


def multiply(prepared: PreparedWeight, x: Tensor, mode: Mode) -> Tensor:
    """Return `x [..., in] @ W.T` in the dtype of `x`; inputs of a few tokens are rounded as `NUMBERS` says."""
    rows, width = prepared.size
    count = x.numel()
    if count == width and prepared.plain is not None and x.dtype == torch.bfloat16 and x.is_contiguous():
        y = multiply_token(prepared.plain, x, NUMBERS[mode])
        return y if y.shape[-1] == rows else y[..., :rows]
    tokens = count // width
    _CACHE.remember(x)
    if tokens > (FEW_FLOATS if prepared.takes_floats else FEW):
        return multiply_many(prepared, x.reshape(tokens, width), _CACHE.turned).reshape(*x.shape[:-1], rows)
    y = multiply_few(prepared, x.reshape(tokens, width), NUMBERS[mode], _CACHE.prepared)
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)


# --- a few tokens ---------------------------------------------------------------------------------------------------


def multiply_few(prepared: PreparedWeight, x: Tensor, numbers: int, known: dict[object, InputBuffers]) -> Tensor:
    """Return the product of a few tokens, float32 `[tokens, out]`; `known`: inputs that were prepared of this `x`."""
    y: Tensor | None = None
    for term in prepared.terms:
        match term:
            case KernelTerm():
                y = _add_packed(y, term, x, numbers, known)
            case Chain(left, right):
                y = _add(y, multiply_few(left, multiply_few(right, x, numbers, known), numbers, {}))
            case PlainMatrix(basis, values):
                inputs = basis.apply(x)
                y = _add(y, torch.nn.functional.linear(inputs, values.to(inputs.dtype)).float())
            case ScatteredMatrix():
                y = _add(y, _multiply_lists(term, x, known))
    y = x.new_zeros(len(x), prepared.size[0], dtype=torch.float32) if y is None else y
    return y[: len(x), : prepared.size[0]]


def _add(y: Tensor | None, more: Tensor) -> Tensor:
    if y is None:
        return more
    y[: len(more), : more.shape[1]] += more
    return y


def _add_packed(
    y: Tensor | None, term: KernelTerm, x: Tensor, numbers: int, known: dict[object, InputBuffers]
) -> Tensor:
    """Return `y` plus the product of a term: float32 with at least as many rows and columns as wanted."""
    packed, numbers = term.packed, term.numbers(numbers)
    inputs = _prepare_inputs(term.basis, packed.input_block, x, numbers, known)
    tokens = len(inputs.tensors[0])
    if y is None or y.shape != (tokens, packed.rows):
        before, y = y, x.new_zeros(tokens, packed.rows, dtype=torch.float32)
        if before is not None:
            size = min(tokens, len(before)), min(packed.rows, before.shape[1])
            y[: size[0], : size[1]] += before[: size[0], : size[1]]
    kernel = build.load_kernel(packed.product(max(1, min(tokens, AT_ONCE)), numbers, False))
    for first in range(0, tokens, AT_ONCE):
        rest = (tensor[first:].data_ptr() for tensor in inputs.tensors[:3])
        addresses = tuple(rest) if first else inputs.addresses[:3]
        values = packed.product_values(addresses, y[first:].data_ptr())
        launch(kernel, values, packed.rows // packed.form.block_rows, packed.rows * packed.columns)
    return y


def _multiply_lists(term: ScatteredMatrix, x: Tensor, known: dict[object, InputBuffers]) -> Tensor:
    """Return the product of a few tokens with elements in lists, perhaps with more rows and tokens than wanted."""
    inputs = _prepare_inputs(term.basis, BLOCK, x, 0, known)
    lists, (tokens, columns) = term.lists, inputs.tensors[0].shape
    kernel = build.load_kernel(ListProduct(lists.kind, min(tokens, AT_ONCE)))
    y = x.new_empty(tokens, LANES * lists.tiles, dtype=torch.float32)
    for first in range(0, tokens, AT_ONCE):
        address = inputs.tensors[0][first].data_ptr()
        matrix = (lists.steps.data_ptr(), lists.heads.data_ptr(), lists.starts.data_ptr())
        values = Values(*matrix, address, 0, 0, y[first].data_ptr(), columns, y.shape[1])
        launch(kernel, values, lists.tiles, LANES * lists.steps.numel())
    return y[: len(x), : lists.size[0]]


def _prepare_inputs(
    basis: Basis, block: int, x: Tensor, numbers: int, known: dict[object, InputBuffers]
) -> InputBuffers:
    """Return a few tokens in a basis, from `known` if it has them; zeros fill whole kernels of tokens."""
    tokens = 1 if len(x) == 1 else -(-len(x) // AT_ONCE) * AT_ONCE
    key = (basis.name, block, numbers, tokens)
    if key not in known:
        buffers = InputBuffers.allocate(basis.width, block, tokens, numbers)
        rows = x if basis.columns is None else x[..., basis.columns]
        bfloat16 = rows.dtype == torch.bfloat16
        rows = rows.contiguous() if bfloat16 else rows.float().contiguous()
        if tokens > 1 and tokens > len(rows):
            rows = torch.cat([rows, rows.new_zeros(tokens - len(rows), basis.width)])
        values = input_values(basis.all_factors, rows.data_ptr(), buffers.addresses)
        build.load_kernel(basis.inputs(block, numbers, bfloat16)).serial(ctypes.addressof(values), 0, tokens)
        known[key] = buffers
    return known[key]


# --- one token in bfloat16: most of generating, so that little is left but the calls of kernels -----------------------


@dataclass(eq=False)
class _TokenInputs:
    """One token in a basis, and the tensor that it was made of."""

    buffers: InputBuffers
    x: Tensor | None = None
    version: int = -1


@dataclass(frozen=True, eq=False)
class _TokenPlan:
    """The parts of a matrix's products with one token that do not change."""

    prepare: Any  # the kernels, and their arguments but for x and y
    x_values: Any
    product: LoadedKernel
    values: Any
    inputs: _TokenInputs
    rows: int
    blocks: int
    weights: int

    @staticmethod
    def of(term: KernelTerm, numbers: int) -> _TokenPlan:
        """Return the plan of a matrix for this thread."""
        basis, packed, numbers = term.basis, term.packed, term.numbers(numbers)
        block = packed.input_block
        key = (basis.name, block, numbers)
        if key not in _TOKENS.inputs:
            _TOKENS.inputs[key] = _TokenInputs(InputBuffers.allocate(basis.width, block, 1, numbers))
        inputs = _TOKENS.inputs[key]
        return _TokenPlan(
            build.load_kernel(basis.inputs(block, numbers, True)).serial,
            input_values(basis.all_factors, 0, inputs.buffers.addresses),
            build.load_kernel(packed.product(1, numbers, True)),
            packed.product_values(inputs.buffers.addresses[:3], 0),
            inputs,
            packed.rows,
            packed.rows // packed.form.block_rows,
            packed.rows * packed.columns,
        )


@dataclass
class _TokenCache(threading.local):
    """The inputs of a thread, which layers share, by basis and form."""

    inputs: dict[object, _TokenInputs] = field(default_factory=dict)


_TOKENS = _TokenCache()


def multiply_token(term: KernelTerm, x: Tensor, numbers: int) -> Tensor:
    """Return the product of a token `[..., in]`, contiguous and bfloat16, with all packed rows: `[..., rows]`.

    The last inputs are prepared once for all layers that share them, except inference tensors, whose changes nobody
    counts.
    """
    plan = term.plans.get((threading.get_ident(), numbers))
    if plan is None:
        plan = term.plans[threading.get_ident(), numbers] = _TokenPlan.of(term, numbers)
    inputs, version = plan.inputs, -1 if x.is_inference() else x._version
    if inputs.x is not x or inputs.version != version or version < 0:
        plan.x_values[INPUTS] = x.data_ptr()
        plan.prepare(ctypes.addressof(plan.x_values), 0, 1)
        inputs.x, inputs.version = x, version
    y = x.new_empty((1,) * (x.ndim - 1) + (plan.rows,))
    plan.values[OUTPUTS] = y.data_ptr()
    launch(plan.product, plan.values, plan.blocks, plan.weights)
    return y
