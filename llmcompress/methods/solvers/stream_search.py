"""Blocks of columns as streams of a trellis, searched where they are: a CPU, or a GPU that can."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, Numbers, longest_stream
from llmcompress.kernels.cpu import column_search

ROOM, ROOM_ON_A_GPU = 1 << 26, 1 << 30  # bytes that streams of a launch work in, if it is more than one
OLDEST_GPU = (7, 0)  # compute capability that Triton compiles for


def can_search(device: torch.device) -> bool:
    """True if a device runs the search itself: the CPU, and NVIDIA GPUs where Triton is installed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cpu"
    able = torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    return able and find_spec("triton") is not None


def choose_columns(block: ColumnBlock, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Choose the columns of a block, where its tensors are if that device can (`searched_there`), else on the CPU.

    Returns the states after each step, int32 `[columns, steps]`, and the errors, float32 `[columns, out]`, of no
    meaning where there are no `shares`. Works in the given tensors, see `ColumnBlock`.
    """
    device = block.current.device
    if device.type == "cpu":
        choose = column_search.choose
    elif can_search(device):
        from llmcompress.kernels.gpu.column_search import choose
    else:
        return _choose_on_cpu(block, numbers)
    columns, streams = len(block.current), len(block.edges) - 1
    states = torch.empty(columns, block.edges[-1], dtype=torch.int32, device=device)
    errors = torch.empty_like(block.current)
    rest = 1 << (numbers.trellis.memory - numbers.trellis.bits)
    room = ROOM if device.type == "cpu" else ROOM_ON_A_GPU
    together = max(1, room // (longest_stream(block) * rest))
    for start in range(0, streams, together):
        choose(block, numbers, states, errors, range(start, min(start + together, streams)))
    return states, errors


def _choose_on_cpu(block: ColumnBlock, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Choose on the CPU for a device that cannot."""
    moved: dict[str, Any] = {name: each.cpu() for name, each in vars(block).items() if isinstance(each, Tensor)}
    here = replace(block, **moved)
    states, errors = choose_columns(here, Numbers(numbers.trellis, numbers.table.cpu().float(), numbers.top))
    block.current.copy_(here.current)
    block.ends.copy_(here.ends)
    return states.to(block.current.device), errors.to(block.current.device)
