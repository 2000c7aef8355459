"""Blocks of columns rounded to grids, or searched for streams of a trellis: where they are, or else on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, GridBlock, Numbers, longest_stream
from llmcompress.kernels.cpu import column_search, grid_columns

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
