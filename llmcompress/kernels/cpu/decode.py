"""Products of one token in bfloat16, the way that most of generating takes: little is left but to call kernels."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.arguments import Argument
from llmcompress.kernels.cpu.dispatch import product_of
from llmcompress.kernels.cpu.launch import Room, launch, of_inputs, of_product
from llmcompress.kernels.cpu.prepare import KernelTerm

INPUTS, OUTPUTS = int(Argument.CODES), int(Argument.Y)  # what changes of the arguments


@dataclass(eq=False)
class _Inputs:
    """One token in a basis, and the tensor that it was made of."""

    room: Room
    x: Tensor | None = None
    version: int = -1


@dataclass(frozen=True, eq=False)
class _Plan:
    """All that does not change between products of a matrix with one token."""

    prepare: Any  # the kernels, and their arguments but for x and y
    x_values: Any
    multiply: build.Loaded
    values: Any
    inputs: _Inputs
    rows: int
    blocks: int
    weights: int


@dataclass
class _Known(threading.local):
    """The inputs of a thread, which layers share, by basis and form."""

    inputs: dict[object, _Inputs] = field(default_factory=dict)


_KNOWN = _Known()


def one_token(term: KernelTerm, x: Tensor, numbers: int) -> Tensor:
    """Return the product of a token `[..., in]`, contiguous and bfloat16, with all packed rows: `[..., rows]`.

    The last inputs are prepared once for all who share them, but inference tensors, whose changes nobody counts.
    """
    plan = term.plans.get((threading.get_ident(), numbers))
    if plan is None:
        plan = term.plans[threading.get_ident(), numbers] = _plan(term, numbers)
    inputs, version = plan.inputs, -1 if x.is_inference() else x._version
    if inputs.x is not x or inputs.version != version or version < 0:
        plan.x_values[INPUTS] = x.data_ptr()
        plan.prepare(ctypes.addressof(plan.x_values), 0, 1)
        inputs.x, inputs.version = x, version
    y = torch.empty((1,) * (x.ndim - 1) + (plan.rows,), dtype=torch.bfloat16)
    plan.values[OUTPUTS] = y.data_ptr()
    launch(plan.multiply, plan.values, plan.blocks, plan.weights)
    return y


def _plan(term: KernelTerm, numbers: int) -> _Plan:
    basis, packed, numbers = term.basis, term.packed, term.numbers(numbers)
    key = (basis.name, term.block, numbers)
    if key not in _KNOWN.inputs:
        _KNOWN.inputs[key] = _Inputs(Room.of(basis, term.block, 1, numbers))
    inputs = _KNOWN.inputs[key]
    return _Plan(
        build.loaded(basis.inputs(term.block, numbers, True)).serial,
        of_inputs(basis, 0, inputs.room.addresses),
        build.loaded(product_of(packed.form, 1, numbers, True)),
        of_product(packed, inputs.room.addresses[:3], 0),
        inputs,
        packed.rows,
        packed.rows // packed.form.block_rows,
        packed.rows * packed.columns,
    )
