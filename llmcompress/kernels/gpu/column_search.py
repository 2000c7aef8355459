"""The launch of the search for the nearest streams on GPUs: what it is compiled for and what it works in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from llmcompress.kernels.column_block import EVERY, ColumnBlock, Numbers, longest_stream
from llmcompress.kernels.gpu.column_search_triton import column_search
from llmcompress.weight.trellis import Trellis

CHECKED = 12  # bits of a state up to which the states at the ends of chunks fit a key
STEPS = 64  # of a chunk
REGISTERS = 4  # bits of a code up to which costs change threads without memory of their own


def choose(block: ColumnBlock, numbers: Numbers, states: Tensor, errors: Tensor, streams: range) -> None:
    """Choose some streams of a block; see `choose_columns`."""
    device, most = block.current.device, longest_stream(block)
    sizes = constants(numbers.trellis, most, block.shares is not None, block.before is not None)
    rest = 1 << (numbers.trellis.memory - numbers.trellis.bits)
    edges = _edges_on(device, block.edges)
    kind, per_step = stored_codes(numbers.trellis)

    def room(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(max(1, len(streams) * count), dtype=dtype, device=device)

    rooms = (
        room(most * (numbers.trellis.values + 1), torch.float32),
        room(most * per_step, kind),
        room(most // STEPS * rest, torch.int16),
        room(2 * rest, torch.int32),
    )
    nothing = block.current  # in the place of what is not read
    given = (block.current, nothing if block.before is None else block.before, block.weights, block.factors)
    shares = nothing if block.shares is None else block.shares
    with torch.cuda.device_of(block.current):
        column_search[(len(streams),)](
            *given, shares, numbers.table, edges, block.ends, states, errors, *rooms,
            block.current.shape[1], len(block.current), streams.start, len(block.edges) - 1, numbers.top,
            **sizes, **launch_options(numbers.trellis),
        )  # fmt: skip


@lru_cache(maxsize=64)
def _edges_on(device: torch.device, edges: tuple[int, ...]) -> Tensor:
    return torch.tensor(edges, dtype=torch.int32, device=device)  # which waits for the device


def constants(trellis: Trellis, most: int, feeds: bool, again: bool) -> dict[str, Any]:
    """Return the constants that the kernel is compiled for; `most`: the steps of the longest stream."""
    return {
        "BITS": trellis.bits,
        "VALUES": trellis.values,
        "MEMORY": trellis.memory,
        "MOST": most,
        "CHUNK": STEPS,
        "EVERY": EVERY,
        "LANES": triton.next_power_of_2(-(-most // STEPS)),
        "BLOCK": 256,
        "FEEDS": feeds,
        "AGAIN": again,
        "ORIGINS": trellis.memory <= CHECKED,
        "IN_REGISTERS": trellis.bits <= REGISTERS,
    }


def launch_options(trellis: Trellis) -> dict[str, Any]:
    """Return the options of the compiler: no products fused with sums but by `tl.fma`, and 4,096 numbers a program or
    at most 1,024 threads."""
    threads = min(1 << (trellis.memory - 4), 1 << (trellis.memory - trellis.bits), 1024)
    options: dict[str, Any] = {"num_warps": max(1, threads // 32), "num_stages": 1, "enable_fp_fusion": False}
    return options | ({"maxnreg": 64} if threads == 1024 else {})  # all there are for each; left alone, 32 are taken


def stored_codes(trellis: Trellis) -> tuple[torch.dtype, int]:
    """Return how oldest codes are kept for the way back: the type of a number, and how many there are a step."""
    if trellis.bits > 3:
        return torch.uint8, 1 << (trellis.memory - trellis.bits)
    return torch.int32 if trellis.bits == 3 else torch.int8, 1 << (trellis.memory - 2 * trellis.bits)
