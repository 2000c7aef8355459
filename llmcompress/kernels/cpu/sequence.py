"""Kernels that are called in sequence by one call, without Python between them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import Any

import torch
from llvmlite import ir

from llmcompress.kernels.cpu.build import Kernel, load_kernel
from llmcompress.kernels.cpu.calls import (
    OWN,
    WORTH_THREADS,
    KernelFunction,
    LoadedKernel,
    find_team,
    launch,
    own_values,
)
from llmcompress.kernels.cpu.emit import ADDRESS, I64


class SequenceArgument(IntEnum):
    """The place of an argument."""

    CALLS = OWN  # int64 [calls, 3]: the address of a kernel, that of its arguments, its blocks
    COUNT = auto()
    TEAM = auto()  # threads
    BARRIER = auto()  # the address of the function at which a team of threads meets; 0 for one thread


@dataclass(frozen=True)
class Sequence:
    """Kernels one after the other, of which each thread of a team does its share. A block is a thread."""

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of threads."""
        kernel = ir.FunctionType(ir.VoidType(), [ADDRESS, I64, I64]).as_pointer()
        meeting = ir.FunctionType(ir.VoidType(), []).as_pointer()
        calls, team = f.pointer(SequenceArgument.CALLS), f.size(SequenceArgument.TEAM)
        barrier = f.size(SequenceArgument.BARRIER)
        some = f.builder.icmp_signed("!=", barrier.raw, f.constant(I64, 0).raw)
        with f.loop(0, f.size(SequenceArgument.COUNT)) as number:
            function, arguments, blocks = (f.load(calls, I64, number * 24 + 8 * place) for place in range(3))
            edges = [(blocks * place) // team for place in (f.first, f.last)]
            called = f.builder.inttoptr(function.raw, kernel)
            f.builder.call(called, [f.address(arguments).raw, *(edge.raw for edge in edges)])
            with f.builder.if_then(some):
                f.builder.call(f.builder.inttoptr(barrier.raw, meeting), [])


@dataclass(eq=False)
class CallSequence:
    """Kernels with their arguments, which may change between runs."""

    entries: list[int] = field(default_factory=list)
    owned: list[Any] = field(default_factory=list)  # what addresses point to
    values: Any = None  # the arguments of `Sequence`, once it has run
    kernel: LoadedKernel = field(default_factory=lambda: load_kernel(Sequence()))

    def add(self, kernel: Kernel, values: Any, blocks: int = 1) -> None:
        """Add a kernel over so many blocks."""
        loaded = load_kernel(kernel)
        self.owned += [loaded, values]
        self.entries += [ctypes.cast(loaded.serial, ctypes.c_void_p).value or 0, ctypes.addressof(values), blocks]

    def run(self) -> None:
        """Run all kernels, in torch's threads, which meet after each."""
        if self.values is None:
            calls = (ctypes.c_int64 * len(self.entries))(*self.entries)
            self.owned.append(calls)
            self.values = own_values([ctypes.addressof(calls), len(self.entries) // 3, 1, 0])
        threads = torch.get_num_threads()
        team = find_team() if threads > 1 else None
        threads = 1 if team is None else threads
        if self.values[SequenceArgument.TEAM] != threads:
            self.values[SequenceArgument.TEAM] = threads
            self.values[SequenceArgument.BARRIER] = 0 if team is None else team.barrier
        launch(self.kernel, self.values, threads, WORTH_THREADS)
