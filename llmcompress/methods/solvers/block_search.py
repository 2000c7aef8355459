"""Blocks of columns rounded to grids, or searched for streams of a trellis: where they are, or else on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, GridBlock, Numbers, longest_stream, whole_weights
from llmcompress.kernels.cpu import column_search, grid_columns
from llmcompress.weight.nodes import TrellisCodes, shape
from llmcompress.weight.trellis import Trellis, cuts, states, table

ROOM, ROOM_ON_A_GPU = 1 << 26, 1 << 30  # bytes that streams of a launch work in, if it is more than one
OLDEST_GPU = (7, 0)  # compute capability that Triton compiles for
Block = TypeVar("Block", GridBlock, ColumnBlock)


@cache
def can_search(device: torch.device) -> bool:
    """True if a device rounds and searches itself: the CPU, and NVIDIA GPUs where Triton is installed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cpu"
    is_able = torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    return is_able and find_spec("triton") is not None


def round_columns(block: GridBlock, errors: Tensor) -> None:
    """Round the columns of a block, in place, and write `errors [columns, out]` of them."""
    device = block.current.device
    if device.type == "cpu":
        grid_columns.round_columns(block, errors)
    elif can_search(device):
        from llmcompress.kernels.gpu.grid_columns import round_columns as round_on_gpu

        round_on_gpu(block, errors)
    else:
        copy, errors_of_copy = _on_cpu(block), errors.cpu()
        grid_columns.round_columns(copy, errors_of_copy)
        block.current.copy_(copy.current)
        errors.copy_(errors_of_copy)


def choose_columns(block: ColumnBlock, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Choose streams for the columns of a block, in place (see `ColumnBlock`).

    Returns the states after each step, int32 `[columns, steps]`, and the errors, float32 `[columns, out]`, of no
    meaning without `shares`.
    """
    device = block.current.device
    if device.type == "cpu":
        choose = column_search.choose
    elif can_search(device):
        from llmcompress.kernels.gpu.column_search import choose
    else:
        return choose_on_cpu(block, numbers)
    columns, streams = len(block.current), len(block.edges) - 1
    states = torch.empty(columns, block.edges[-1], dtype=torch.int32, device=device)
    errors = torch.empty_like(block.current)
    rest = 1 << (numbers.trellis.memory - numbers.trellis.bits)
    room = ROOM if device.type == "cpu" else ROOM_ON_A_GPU
    together = max(1, room // (longest_stream(block) * rest))
    for start in range(0, streams, together):
        choose(block, numbers, states, errors, range(start, min(start + together, streams)))
    return states, errors


def choose_on_cpu(block: ColumnBlock, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Do as `choose_columns`, for a device that cannot."""
    copy = _on_cpu(block)
    states, errors = choose_columns(copy, Numbers(numbers.trellis, numbers.table.cpu().float(), numbers.top))
    block.current.copy_(copy.current)
    block.ends.copy_(copy.ends)
    return states.to(block.current.device), errors.to(block.current.device)


def _on_cpu(block: Block) -> Block:
    """Return a block with copies of its tensors on the CPU."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.cpu() if isinstance(value, Tensor) else value

    return replace(block, **{name: move(value) for name, value in vars(block).items()})


class TrellisStreams:
    """A `BlockProjection` of the columns of a matrix to the nearest streams.

    A column of a chain starts in the state in which the one before it ended. One that is chosen again must end as it
    did before, where the next one starts; so columns can be chosen again in any order. Rings are free of each other.
    Everything stays on the device of the weights, and no column waits for a GPU.
    """

    strides: tuple[int, ...] = ()

    def __init__(self, scale: Tensor, width: int, trellis: Trellis, run: int, rows: Tensor | None = None) -> None:
        """Take `width` columns under a float16 scale `[out, 1]` a row; `rows [out]`: importance of squared errors."""
        self.scale, self.trellis, self.run = scale, trellis, run
        self.edges = tuple(cuts(len(scale), run, trellis))
        device = scale.device
        self.states = torch.zeros(width, self.edges[-1], dtype=torch.int32, device=device)
        self.ends = torch.full((width + 1, len(self.edges) - 1), -1, dtype=torch.int32, device=device)
        self.ends[0] = 0
        self.factors = scale[:, 0].float()
        importance = self.factors.square() if rows is None else self.factors.square() * rows
        runs = [importance[first * trellis.values : last * trellis.values] for first, last in pairwise(self.edges)]
        self.weights = torch.cat([whole_weights(run, trellis) for run in runs])  # streams do not share their costs
        self.numbers = _numbers(trellis, device)

    @staticmethod
    def of(w: TrellisCodes, rows: Tensor | None = None) -> TrellisStreams:
        """Return the columns of `w`, to be chosen again."""
        width = shape(w)[1]
        found = TrellisStreams(w.scale, width, w.trellis, w.run, rows)
        for first, last in pairwise(found.edges):
            found.states[:, first:last] = states(w.codes[first * width : last * width], width, w.trellis)
        last_steps = torch.tensor(found.edges[1:], device=w.codes.device) - 1
        found.ends[1:] = found.states[:, last_steps]
        return found

    def project_block(self, columns: slice, current: Tensor, shares: Tensor | None) -> Tensor:
        """See `BlockProjection`."""
        return self.choose(columns.start, current[columns], shares)

    def choose(self, start: int, current: Tensor, shares: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Overwrite columns from `start` on, `current [columns, out]`, with stored values; see `BlockProjection`.

        With `before`, the values stored before, errors are the values stored now less those.
        """
        part = slice(start, start + len(current))
        ends = self.ends[start : part.stop + 1]
        taken = None if shares is None else shares.contiguous()
        block = ColumnBlock(current, self.weights, self.factors, self.edges, ends, taken, before)
        self.states[part], errors = choose_columns(block, self.numbers)
        return errors

    def weight(self, values: Tensor) -> TrellisCodes:
        """Return the expression for the chosen streams, which are `values [out, in]`."""
        streams = [self.states[:, first:last].reshape(-1) for first, last in pairwise(self.edges)]
        codes = torch.cat(streams).bitwise_and_((1 << self.trellis.bits) - 1).to(torch.uint8)
        return TrellisCodes(codes.to(values.device), self.scale, self.trellis, self.run)


@lru_cache(maxsize=16)
def _numbers(trellis: Trellis, device: torch.device) -> Numbers:
    return Numbers.on(device, trellis, table(trellis))
