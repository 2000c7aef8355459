"""Kernels run on as many threads as torch is told to use, in forked processes, and for several callers at once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.kernels.cpu import calls, matmul
from llmcompress.kernels.cpu.build import load_kernel
from llmcompress.kernels.cpu.calls import Argument, KernelFunction
from llmcompress.kernels.cpu.prepare import prepare
from llmcompress.weight.nodes import RotatedInputs
from llmcompress.weight.trellis import Trellis
from tests.builders import grid, seeded, streams

needs_team = pytest.mark.skipif(calls.find_team() is None, reason="torch has no GNU OpenMP here")


@dataclass(frozen=True)
class WritesShares:
    """A kernel that writes, for every block of its share, where the share begins."""

    def write(self, f: KernelFunction) -> None:
        with f.loop(f.first, f.last) as block:
            f.store(f.arguments[1], f.pointer(Argument.Y), block * 8)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prepared() -> list[Any]:
    """Weights that are worth a team."""
    signs = torch.rand(512, generator=seeded(1)) < 0.5
    found = [
        prepare(grid((256, 512), 16, 64, 1, symmetric=True)),
        prepare(RotatedInputs(streams(Trellis(2, 1, 12, "linear"), 256, 512, 768), signs, 512)),
    ]
    assert all(one.plain.packed.rows * one.plain.packed.columns >= calls.WORTH_THREADS for one in found)
    return [one for one in found if one is not None]


def inputs(seed: int, tokens: int = 1) -> Tensor:
    return torch.randn(tokens, 512, generator=seeded(seed))


def shares(blocks: int, weights: int) -> list[int]:
    """Run a kernel as products do; return the blocks of each thread."""
    y = torch.full((blocks,), -1)
    values = matmul.Values()
    values[Argument.Y] = y.data_ptr()
    calls.launch(load_kernel(WritesShares()), values, blocks, weights)
    starts, counts = y.unique(return_counts=True)
    assert torch.equal(starts, counts.cumsum(0) - counts), "each block is somebody's, and shares are runs"
    return counts.tolist()


@needs_team
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_launch_uses_the_threads_of_torch(count: int) -> None:
    torch.set_num_threads(count)
    found = shares(30, calls.WORTH_THREADS)
    assert found == [30 // count] * count
    assert shares(30, calls.WORTH_THREADS - 1) == [30], "too little to wake a team"
    assert shares(2, calls.WORTH_THREADS) == ([2] if count == 1 else [1, 1]), "no thread without a block"
    uneven = shares(7, calls.WORTH_THREADS)
    assert len(uneven) == count and max(uneven) - min(uneven) <= 1


@needs_team
@pytest.mark.parametrize("count", [1, 3])
def test_a_team_has_distinct_threads(count: int) -> None:
    found = calls.find_team()
    ids, lock = [], threading.Lock()

    def work(data: int | None) -> None:
        with lock:
            ids.append(threading.get_native_id())

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
    found.parallel(ctypes.cast(callback, ctypes.c_void_p), None, count, 0)
    assert len(ids) == len(set(ids)) == count
    assert threading.get_native_id() in ids, "the caller is one of them"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
def test_a_forked_process_computes_the_same(count: int) -> None:
    """As workers of a DataLoader do, also of a process whose threads are at work already: none of them is copied."""
    torch.set_num_threads(count)
    weights, x = prepared(), inputs(1)
    wanted = [matmul.multiply(w, x, "auto") for w in weights]
    assert calls.find_team() is None or len(shares(8, calls.WORTH_THREADS)) == count

    def work() -> None:
        same = all(torch.equal(matmul.multiply(w, x.clone(), "auto"), y) for w, y in zip(weights, wanted))
        os._exit(0 if same and calls.find_team() is None else 1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert (calls.find_team() is None) == (calls._openmp() is None), "nothing changes here"


def test_a_fresh_process_has_a_team() -> None:
    """Only a fork takes it away: modules of spawned processes are imported there."""
    assert not calls._FORKED


@pytest.mark.parametrize("count", [1, 2])
def test_threads_that_multiply_at_once_do_not_share_buffers(count: int) -> None:
    """Each has its own prepared inputs, and its own team."""
    torch.set_num_threads(count)
    weights = prepared()
    cases = [
        (w, inputs(seed, tokens), mode)
        for seed, tokens in enumerate((1, 1, 3, 17))
        for w in weights
        for mode in ("auto", "exact")
    ]
    wanted = [matmul.multiply(w, x, mode) for w, x, mode in cases]
    together = threading.Barrier(4)

    def work(first: int) -> list[tuple[int, Tensor]]:
        torch.set_num_threads(count)  # OpenMP counts by thread
        together.wait()
        order = [(first + 3 * at) % len(cases) for at in range(len(cases))] * 5
        return [(at, matmul.multiply(*cases[at])) for at in order]

    with ThreadPoolExecutor(4) as pool:
        found = [pair for pairs in pool.map(work, range(0, 16, 4)) for pair in pairs]
    assert len({at for at, _ in found}) == len(cases)
    assert all(torch.equal(y, wanted[at]) for at, y in found)
