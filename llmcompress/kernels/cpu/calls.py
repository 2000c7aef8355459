"""Calls of kernels: their arguments, and torch's threads, which share the blocks of rows.

Kernels run in torch's own OpenMP threads, so that no thread waits for another pool's; `torch.set_num_threads` decides
how many. They run in the calling thread if torch has no GNU OpenMP, and in processes made by `fork`, which lack the
threads that OpenMP would wait for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from llmcompress.kernels.cpu.emit import ADDRESS, I32, I64, Function, Value
from llmcompress.kernels.cpu.instruction_sets import Instructions

WORTH_THREADS = 1 << 17  # weights, below which a team takes longer to wake


class Argument(IntEnum):
    """The place of an argument in an array of int64. Sizes count numbers unless they say bytes."""

    CODES = 0
    SCALES = 1  # of weights, float16 or bfloat16 [row tiles, groups, 16]
    ZEROS = 2  # uint8, alike; or nothing
    X = 3  # [tokens, columns]: int8, or float32 in exact products
    X_SCALE = 4  # float32 [tokens, blocks]: of a block of int8 inputs
    X_SUM = 5  # float32 [tokens, blocks]: sums of the inputs
    Y = 6  # float32 [tokens, rows], added to
    COLUMNS = 7  # rounded up to whole blocks
    ROWS = 8  # rounded up to whole blocks
    GROUPS = 9
    TABLE = 10  # float32 [length, entries]: of a codebook; or nothing
    BLOCKS = 11  # of rows, which threads share
    THREADS = 12  # address of the function that returns the number of threads
    THREAD = 13  # address of the function that returns the number of the calling thread


Values = ctypes.c_int64 * len(Argument)
OWN = len(Argument)  # place of the first argument of a kernel with arguments of its own


def own_values(numbers: Sequence[int]) -> Any:
    """Return the arguments of a kernel that has its own ones from place `OWN` on."""
    return (ctypes.c_int64 * (OWN + len(numbers)))(*[0] * OWN, *numbers)


def address_of(tensor: Tensor | None) -> int:
    """Return the address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class KernelFunction(Function):
    """The function `kernel(arguments, first block, last block)` of a module, for the processors of `target`."""

    def __init__(self, module: ir.Module, target: Instructions) -> None:
        super().__init__(module, "kernel", [ADDRESS, I64, I64], target.tier.fused)
        self.target = target
        self.first, self.last = self.arguments[1:]

    def size(self, argument: IntEnum) -> Value:
        """Read an argument as a number."""
        return self.load(self.arguments[0], I64, 8 * argument)

    def pointer(self, argument: IntEnum) -> Value:
        """Read an argument as an address."""
        return self.address(self.size(argument))

    def item(self, argument: IntEnum, kind: Any, place: Value) -> Value:
        """Read a value of some `kind` from a tensor of 4-byte numbers, from a place on."""
        return self.load(self.pointer(argument), kind, place * 4)


def write_parallel(module: ir.Module) -> None:
    """Write `parallel(arguments)`, by which each thread of a team runs `kernel` on its share of the blocks."""
    f = Function(module, "parallel", [ADDRESS])
    kind = ir.FunctionType(I32, [])

    def read(argument: Argument) -> Value:
        return f.load(f.arguments[0], I64, 8 * argument)

    count, own = (
        Value(f, f.builder.call(f.builder.inttoptr(read(which).raw, kind.as_pointer()), [])).wider(I64)
        for which in (Argument.THREADS, Argument.THREAD)
    )
    blocks = read(Argument.BLOCKS)
    edges = [Value(f, f.builder.sdiv((blocks * place).raw, count.raw)) for place in (own, own + 1)]
    f.builder.call(module.globals["kernel"], [f.arguments[0].raw, *(edge.raw for edge in edges)])
    f.finish()


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A kernel in memory, as one thread and as a team of threads call it."""

    serial: Any  # (arguments, first, last)
    parallel: int  # address
    library: Any  # owns the code


def launch(kernel: LoadedKernel, values: Any, blocks: int, weights: int) -> None:
    """Run a kernel over all blocks of rows, by torch's threads where so many `weights` are worth it."""
    threads = min(torch.get_num_threads(), blocks) if weights >= WORTH_THREADS else 1
    team = find_team() if threads > 1 else None
    if team is None:
        kernel.serial(ctypes.addressof(values), 0, blocks)
        return
    values[Argument.BLOCKS] = blocks
    values[Argument.THREADS], values[Argument.THREAD] = team.count, team.number
    team.parallel(kernel.parallel, ctypes.addressof(values), threads, 0)


@dataclass(frozen=True, eq=False)
class Team:
    """OpenMP's entry points: `parallel(function, data, threads, flags)`, and the addresses of three more functions."""

    parallel: Any
    count: int
    number: int
    barrier: int


def find_team() -> Team | None:
    """Return the OpenMP of torch; None if it is not GNU's, or does not work in this process."""
    return None if _FORKED else _openmp()


@lru_cache(maxsize=1)
def _openmp() -> Team | None:
    beside = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    for name in (*map(str, beside), None):
        try:
            library = ctypes.CDLL(name)
            parallel = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        others = (library.omp_get_num_threads, library.omp_get_thread_num, library.GOMP_barrier)
        addresses = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in others)
        return Team(parallel, *addresses)
    return None


_FORKED: list[bool] = []  # not empty in a process that another one forked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(True))
