"""Calls of kernels: room for inputs, arguments, and the threads that share the rows."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.cpu.arguments import Argument
from llmcompress.kernels.cpu.build import Loaded
from llmcompress.kernels.cpu.layouts import KernelMatrix
from llmcompress.kernels.cpu.prepare import Basis
from llmcompress.kernels.cpu.threads import team

BLOCK = 64  # columns of a block of inputs, where no kernel wants others
WORTH_THREADS = 1 << 17  # weights, below which a team takes longer to wake
Values = ctypes.c_int64 * len(Argument)


@dataclass(frozen=True, eq=False)
class Room:
    """Room for the inputs of some tokens in a basis: codes or floats, their scales, their sums, and the work itself."""

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @staticmethod
    def of(basis: Basis, block: int, tokens: int, numbers: int) -> Room:
        """Return room for so many tokens, in blocks of so many columns."""
        blocks = -(-basis.width // block)
        columns = blocks * block
        x = torch.empty(tokens, columns * max(numbers, 1), dtype=torch.int8 if numbers else torch.float32)
        tensors = (x, *(torch.empty(tokens, count) for count in (blocks, blocks, columns)))
        return Room(tensors, tuple(tensor.data_ptr() for tensor in tensors))


def of_inputs(basis: Basis, x: int, addresses: tuple[int, ...]) -> Any:
    """Return the arguments of the kernel of inputs; `addresses`: of codes, scales, sums, and room to work in."""
    factors = basis.all_factors
    return Values(x, 0 if factors is None else factors.data_ptr(), 0, *addresses)


def of_product(packed: KernelMatrix, inputs: tuple[int, ...], y: int) -> Any:
    """Return the arguments of a product; `inputs`: the addresses of codes, scales and sums."""
    return Values(*packed.addresses, *inputs, y, packed.columns, packed.rows, packed.groups, packed.table_address)


def launch(kernel: Loaded, values: Any, blocks: int, weights: int) -> None:
    """Run a kernel over all blocks of rows, by torch's threads where that pays."""
    threads = min(torch.get_num_threads(), blocks) if weights >= WORTH_THREADS else 1
    found = team() if threads > 1 else None
    if found is None:
        kernel.serial(ctypes.addressof(values), 0, blocks)
        return
    values[Argument.BLOCKS] = blocks
    values[Argument.THREADS], values[Argument.THREAD] = found.count, found.number
    found.parallel(kernel.parallel, ctypes.addressof(values), threads, 0)
