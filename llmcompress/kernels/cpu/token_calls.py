"""The calls of kernels for one token being put together: products of prepared weights, and what lies between them.

Vectors are bfloat16, at addresses that all sequences of a thread share by name, since each writes them before it reads
them. A product of several terms is summed up in float32.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.cpu.calls import Values, own_values
from llmcompress.kernels.cpu.emit import LANES
from llmcompress.kernels.cpu.prepare import Basis, Chain, KernelTerm, PlainMatrix, PreparedWeight, ScatteredMatrix
from llmcompress.kernels.cpu.quantize_inputs import BLOCK, InputBuffers, input_values
from llmcompress.kernels.cpu.scattered import ListProduct
from llmcompress.kernels.cpu.sequence import CallSequence
from llmcompress.kernels.cpu.vectors import ROWS, DenseProduct, Move


@dataclass(frozen=True)
class Vector:
    """A token's numbers at an address."""

    address: int
    bfloat16: bool = True


@dataclass(eq=False)
class TokenCalls:
    """Calls being put together.

    `numbers`: the integers of an input. `ready`: what buffers of prepared inputs hold by then, as (basis, vector).
    """

    numbers: int
    sequence: CallSequence = field(default_factory=CallSequence)
    ready: dict[object, tuple[object, Vector]] = field(default_factory=dict)

    def add(self, kernel: Any, values: Any, blocks: int = 1) -> None:
        """Add a call that is no product."""
        self.sequence.add(kernel, values, blocks)
        self.ready.clear()  # it may have written there

    def room(self, name: str, count: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Return the address of `count` numbers, which all blocks use by that name."""
        key = (name, count, dtype)
        if key not in _HERE.tensors:
            _HERE.tensors[key] = torch.empty(count, dtype=dtype, device="cpu")
        self.sequence.owned.append(_HERE.tensors[key])
        return _HERE.tensors[key].data_ptr()

    def multiply(self, weight: PreparedWeight, x: int, name: str) -> int:
        """Add the product of a weight with the bfloat16 vector at `x`; return the address of the result."""
        plain, source = weight.plain, Vector(x)
        if plain is not None:
            y = self.room(name, plain.packed.rows)
            self._multiply_packed(plain, source, y, True)
            return y
        rows = _packed_rows(weight)
        total, y = self._sum_terms(weight, source, name), self.room(name, rows)
        self.sequence.add(Move(rows, "round"), own_values([total, 0, y]))
        return y

    def _sum_terms(self, weight: PreparedWeight, x: Vector, name: str) -> int:
        """Add the product of a weight of several terms; return the address of the float32 result."""
        rows = _packed_rows(weight)
        total = self.room(f"{name} sum", rows, torch.float32)
        self.sequence.add(Move(rows, "clear"), own_values([0, 0, total]))
        for number, term in enumerate(weight.terms):
            match term:
                case KernelTerm():
                    self._multiply_packed(term, x, total, False)
                case Chain(left, right):
                    between = Vector(self._sum_terms(right, x, f"{name} {number} right"), False)
                    product = self._sum_terms(left, between, f"{name} {number} left")
                    self.sequence.add(Move(left.size[0], "add"), own_values([product, 0, total]))
                case PlainMatrix(basis, values):
                    inputs = self._prepare(basis, BLOCK, x, 0)
                    matrix = values.bfloat16().contiguous()
                    kernel = DenseProduct(matrix.shape[0], matrix.shape[1])
                    self.sequence.owned.append(matrix)
                    arguments = own_values([matrix.data_ptr(), inputs.addresses[0], total])
                    self.sequence.add(kernel, arguments, -(-matrix.shape[0] // ROWS))
                case ScatteredMatrix():
                    self._multiply_lists(term, x, total, f"{name} {number} lists")
        return total

    def _multiply_packed(self, term: KernelTerm, x: Vector, y: int, bfloat16: bool) -> None:
        """Add the product of a packed matrix, written to `y`, or added there in float32."""
        packed, numbers = term.packed, term.numbers(self.numbers)
        buffers = self._prepare(term.basis, packed.input_block, x, numbers)
        values = packed.product_values(buffers.addresses[:3], y)
        self.sequence.add(packed.product(1, numbers, bfloat16), values, packed.rows // packed.form.block_rows)
        self.sequence.owned.append(packed)

    def _multiply_lists(self, term: ScatteredMatrix, x: Vector, total: int, name: str) -> None:
        """Add the product of elements in lists to the float32 numbers at `total`."""
        lists, inputs = term.lists, self._prepare(term.basis, BLOCK, x, 0)
        rows = LANES * lists.tiles
        product = self.room(name, rows, torch.float32)
        matrix = (lists.steps.data_ptr(), lists.heads.data_ptr(), lists.starts.data_ptr())
        values = Values(*matrix, inputs.addresses[0], 0, 0, product, inputs.tensors[0].shape[1], rows)
        self.sequence.add(ListProduct(lists.kind, 1), values, lists.tiles)
        self.sequence.owned.append(lists)
        self.sequence.add(Move(lists.size[0], "add"), own_values([product, 0, total]))

    def _prepare(self, basis: Basis, block: int, x: Vector, numbers: int) -> InputBuffers:
        """Add the preparation of inputs in a basis, unless their buffers hold them."""
        key = (basis.width, block, numbers)
        if key not in _HERE.inputs:
            _HERE.inputs[key] = InputBuffers.allocate(basis.width, block, 1, numbers)
        buffers = _HERE.inputs[key]
        if self.ready.get(key) == (basis.name, x):
            return buffers
        self.ready[key] = basis.name, x
        source = x
        if basis.columns is not None:
            source = Vector(self.room("columns", basis.width))
            values = own_values([x.address, basis.columns.data_ptr(), source.address])
            self.sequence.add(Move(basis.width, "gather"), values)
        values = input_values(basis.all_factors, source.address, buffers.addresses)
        self.sequence.add(basis.inputs(block, numbers, source.bfloat16), values)
        self.sequence.owned += [buffers, basis]
        return buffers


def has_calls(weight: object) -> bool:
    """True if a prepared weight multiplies in sequences of calls."""
    return isinstance(weight, PreparedWeight) and bool(weight.terms) and _takes_vector(weight, True)


def _takes_vector(weight: PreparedWeight, bfloat16: bool) -> bool:
    """True if all terms take a bfloat16, or float32, vector: only bfloat16 numbers are gathered."""
    for term in weight.terms:
        if isinstance(term, Chain):
            if not (_takes_vector(term.right, bfloat16) and _takes_vector(term.left, False)):
                return False
        elif term.basis.columns is not None and not bfloat16:
            return False
    return True


def _packed_rows(weight: PreparedWeight) -> int:
    """Return the rows that kernels write, padding included."""
    return max([weight.size[0], *(term.packed.rows for term in weight.terms if isinstance(term, KernelTerm))])


@dataclass
class _ThreadRoom(threading.local):
    """Memory of a thread: vectors and prepared inputs, which all blocks write one after the other, and scores."""

    tensors: dict[object, Tensor] = field(default_factory=dict)
    inputs: dict[object, InputBuffers] = field(default_factory=dict)
    scores: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32, device="cpu"))


_HERE = _ThreadRoom()


def scores_address(count: int) -> int:
    """Return the address of so many float32 numbers of this thread."""
    if len(_HERE.scores) < count:
        _HERE.scores = _HERE.scores.new_empty(2 * count)
    return _HERE.scores.data_ptr()
