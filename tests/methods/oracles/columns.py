"""A column of one stream, searched, and the same search in plain numpy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.weight.trellis import Trellis, table

COST, CAP, WHOLE, WIDEST, EVERY, SEAM = 12, 1 << 30, np.float32((1 << 23) + 1), np.float32(10), 16, 64


def numbers_of(trellis: Trellis, device: str = "cpu") -> Numbers:
    """The numbers of a trellis, for a search."""
    return Numbers.on(torch.device(device), trellis, table(trellis))


def searched(trellis: Trellis, wanted: Tensor, importance: Tensor, start: int = 0, end: int = -1) -> Tensor:
    """The states, int32 `[steps]`, nearest to `wanted [steps, values]` under `importance`, alike."""
    rows = wanted.reshape(-1)
    block = ColumnBlock(
        rows[None].clone(),
        whole_weights(importance.reshape(-1), trellis),
        torch.ones_like(rows),
        (0, len(wanted)),
        torch.tensor([[start], [end]], dtype=torch.int32),
    )
    return choose_columns(block, numbers_of(trellis))[0][0]


def plainly(trellis: Trellis, wanted: Tensor, importance: Tensor, start: int, end: int) -> NDArray[np.int64]:
    """The same states by arrays of costs, state for state: of equally cheap paths that with the lowest oldest code, of
    equally cheap ends that in the lowest state but for its oldest code."""
    weights = whole_weights(importance.reshape(-1), trellis).reshape(importance.shape).numpy()
    numbers = np.clip(wanted.numpy(), -WIDEST, WIDEST)
    if trellis.ring:
        side = min(SEAM // trellis.values, len(numbers) // 2)
        around = np.arange(-side, side) % len(numbers)
        start = end = int(_cheapest_way(trellis, numbers[around], weights[around], None, -1)[side - 1])
    return _cheapest_way(trellis, numbers, weights, start, end)


def _cheapest_way(
    trellis: Trellis, numbers: NDArray[np.float32], weights: NDArray[np.float32], start: int | None, end: int
) -> NDArray[np.int64]:
    found, parts = table(trellis).numpy(), 1 << trellis.bits
    rest = 1 << (trellis.memory - trellis.bits)
    costs = np.full(rest, CAP, np.uint64)
    costs[slice(None) if start is None else start % rest] = 0
    oldest = []
    for step, (x, weight) in enumerate(zip(numbers, weights, strict=True)):
        over = np.maximum(np.abs(x) - np.abs(found).max(), np.float32(0))
        parts_of_shift = (x * x - over * over) * weight
        shift = np.add.reduce(parts_of_shift, dtype=np.float32)
        total = np.full(len(found), shift + WHOLE, np.float32)
        for value, slope in enumerate(x * weight * np.float32(-2)):
            inner = fused(found[:, value], weight[value], slope)
            total = fused(found[:, value], inner, total)
        moved = (total.view(np.uint32).astype(np.uint64) << COST) & 0xFFFFFFFF
        arriving = (costs.repeat(parts) + moved).reshape(parts, rest)
        oldest.append(arriving.argmin(0))
        costs = np.minimum(arriving.min(0), CAP)
        if step % EVERY == EVERY - 1:
            costs -= costs.min()
    place = int(costs.argmin()) if end < 0 else end % rest
    way = []
    for codes in reversed(oldest):
        state = int(codes[place]) * rest + place
        way.append(state)
        place = state >> trellis.bits
    return np.array(way[::-1])


def fused(number: NDArray[np.float32], factor: NDArray[np.float32], addend: NDArray[np.float32]) -> NDArray[np.float32]:
    """`number * factor + addend`, rounded once: float64 holds the product, and here the sum."""
    wide = number.astype(np.float64) * np.asarray(factor, np.float64) + np.asarray(addend, np.float64)
    return wide.astype(np.float32)
