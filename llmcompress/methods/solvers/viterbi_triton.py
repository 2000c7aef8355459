"""The search of `viterbi.py` on a GPU: one Triton kernel, in which a program searches one stream of a column.

States that differ only in their oldest code share the cheapest cost. These costs, after the last step and after this
one, are in a buffer that stays in the GPU's cache for any size of trellis; threads synchronise once a step. The oldest
codes that survived are recorded and traced back at the end. Nothing leaves the device, nothing waits for the host.

The states are those that `viterbi.py` finds, ties included: the same sums and products in the same order, each rounded
by itself. The kernel is therefore compiled without fused multiply-adds (`enable_fp_fusion=False`; a test reads the
machine code). Only programs that search import this file: Triton comes with torch for GPUs, not with torch for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress.weight.trellis import Trellis, table

FAR = tl.constexpr(2e30)  # the cost, at first, of states that no way leads to
UNREACHED = tl.constexpr(1e30)  # costs from here on
LANES = 1024  # states that a program looks at together, at most
Search = Callable[[Tensor, Tensor, Tensor], Tensor]


def search(trellis: Trellis, edges: list[int], importance: Tensor) -> Search:
    """The function `(wanted, starts, ends) -> states` for columns of streams, see `methods/streams.py`, on one device.

    `importance` float32 `[steps, values]`; a stream lasts from one of `edges` to the next. `wanted` is like
    `importance`; `starts` and `ends` int32 `[streams]`, contiguous, -1 for any end; `states` int32 `[steps]`.
    """
    importance = importance.contiguous()
    device, rest = importance.device, 1 << (trellis.memory - trellis.bits)
    streams = len(edges) - 1
    numbers = table(trellis).T.contiguous().to(device)
    bounds = torch.tensor(edges, dtype=torch.int32, device=device)
    costs = torch.empty(streams, 2, rest, device=device)
    oldest = torch.empty(edges[-1], rest, dtype=torch.uint8, device=device)
    options = constants(trellis) | launch_options(trellis)

    def find(wanted: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        states = torch.empty(edges[-1], dtype=torch.int32, device=device)
        with torch.cuda.device_of(wanted):
            given = (wanted.contiguous(), importance, numbers, bounds, starts, ends)
            way[(streams,)](*given, costs, oldest, states, **options)
        return states

    return find


def constants(trellis: Trellis) -> dict[str, int]:
    """Return the constants that the kernel is compiled for."""
    lanes = min(1 << (trellis.memory - trellis.bits), LANES)
    return {"BITS": trellis.bits, "VALUES": trellis.values, "MEMORY": trellis.memory, "LANES": lanes}


def launch_options(trellis: Trellis) -> dict[str, Any]:
    """Return the options of the compiler: no fused multiply-adds, two states a thread."""
    return {"num_warps": max(1, constants(trellis)["LANES"] // 64), "num_stages": 1, "enable_fp_fusion": False}


@triton.jit(do_not_specialize_on_alignment=["starts", "ends"])
def way(
    wanted,
    importance,
    numbers,
    edges,
    starts,
    ends,
    costs,
    oldest,
    states,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    MEMORY: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the `states` of one stream. `numbers` float32 `[values, states]`; the others as in `search`.

    `costs` float32 `[streams, 2, rest]` and `oldest` uint8 `[steps, rest]` are for the kernel's own use; `rest` is the
    number of states but for their oldest code.
    """
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    stream = tl.program_id(0)
    first, last = tl.load(edges + stream), tl.load(edges + stream + 1)
    start, state = tl.load(starts + stream), tl.load(ends + stream)
    costs += stream * (2 * REST)
    row = oldest + first.to(tl.int64) * REST
    _enter(start, costs, row, BITS, MEMORY, LANES)
    tl.debug_barrier()
    for step in range(1, last - first):
        row += REST
        before, after = costs + (step - 1) % 2 * REST, costs + step % 2 * REST
        told = _told(wanted, importance, first + step - 1, VALUES)
        _step(before, after, row, numbers, told, BITS, VALUES, MEMORY, LANES)
        tl.debug_barrier()
    if state < 0:
        told = _told(wanted, importance, last - 1, VALUES)
        state = _cheapest(costs + (last - first - 1) % 2 * REST, numbers, told, BITS, VALUES, MEMORY, LANES)
    for back in range(1, last - first + 1):
        tl.store(states + last - back, state)
        later = state >> BITS
        state = tl.load(row + later).to(tl.int32) << (MEMORY - BITS) | later
        row -= REST


@triton.jit
def _enter(start, costs, oldest, BITS: tl.constexpr, MEMORY: tl.constexpr, LANES: tl.constexpr):
    """Only `start` is reached."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    for begin in range(0, REST, LANES):
        later = begin + tl.arange(0, LANES)
        here = later == start % REST
        tl.store(costs + later, tl.where(here, 0.0, FAR))
        tl.store(oldest + later, tl.where(here, start >> (MEMORY - BITS), 0).to(tl.uint8))


@triton.jit
def _told(wanted, importance, step, VALUES: tl.constexpr):
    """Return the costs of the numbers of a step: slope and weight, of the first and of the last of them."""
    one, two = step * VALUES, step * VALUES + VALUES - 1
    weight, weight2 = tl.load(importance + one), tl.load(importance + two)
    return -2.0 * tl.load(wanted + one) * weight, weight, -2.0 * tl.load(wanted + two) * weight2, weight2


@triton.jit
def _reached(before, base, state, numbers, told, BITS: tl.constexpr, VALUES: tl.constexpr, MEMORY: tl.constexpr):
    """The cost of states after a step, from the costs `before` it, of which `base` is taken off."""
    slope, weight, slope2, weight2 = told
    number = tl.load(numbers + state)
    cost = tl.load(before + (state >> BITS)) - base + number * (slope + weight * number)
    if VALUES == 2:
        number = tl.load(numbers + (1 << MEMORY) + state)
        cost += number * (slope2 + weight2 * number)
    return cost


@triton.jit
def _base(before):
    """Return the part common to all costs; taking it off keeps them from growing until they are rounded."""
    base = tl.load(before)
    return tl.where(base < UNREACHED, base, 0.0)


@triton.jit
def _step(
    before,
    after,
    oldest,
    numbers,
    told,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    MEMORY: tl.constexpr,
    LANES: tl.constexpr,
):
    """The cheapest of the states that differ in their oldest code alone; of equally cheap ones that of the lowest."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    base = _base(before)
    for begin in range(0, REST, LANES):
        later = begin + tl.arange(0, LANES)
        low = _reached(before, base, later, numbers, told, BITS, VALUES, MEMORY)
        chosen = tl.zeros_like(later)
        for old in range(1, 1 << BITS):
            cost = _reached(before, base, old * REST + later, numbers, told, BITS, VALUES, MEMORY)
            chosen = tl.where(cost < low, old, chosen)
            low = tl.where(cost < low, cost, low)
        tl.store(after + later, low)
        tl.store(oldest + later, chosen.to(tl.uint8))


@triton.jit
def _cheapest(
    before,
    numbers,
    told,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    MEMORY: tl.constexpr,
    LANES: tl.constexpr,
):
    """The cheapest state of all; of equally cheap ones that of the lowest newest code, then the lowest."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    base = _base(before)
    lowest, at = tl.full([LANES], float("inf"), tl.float32), tl.zeros([LANES], tl.int32)
    for begin in range(0, 1 << MEMORY, LANES):
        place = begin + tl.arange(0, LANES)
        state = place % REST << BITS | place // REST
        cost = _reached(before, base, state, numbers, told, BITS, VALUES, MEMORY)
        at = tl.where(cost < lowest, place, at)
        lowest = tl.where(cost < lowest, cost, lowest)
    place = tl.min(tl.where(lowest == tl.min(lowest, 0), at, 1 << MEMORY), 0)
    return place % REST << BITS | place // REST
