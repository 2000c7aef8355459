"""Runs of columns rounded to grids where they are: a CPU, or a GPU that can."""

from __future__ import annotations

from torch import Tensor

from llmcompress.kernels.column_block import GridBlock
from llmcompress.kernels.cpu import grid_columns
from llmcompress.methods.solvers.stream_search import can_search


def round_columns(block: GridBlock, errors: Tensor) -> None:
    """Round the columns of a block where its tensors are, else on the CPU; write `errors [columns, out]` of them."""
    device = block.current.device
    if device.type == "cpu":
        grid_columns.round_columns(block, errors)
    elif can_search(device):
        from llmcompress.kernels.gpu.grid_columns import round_columns as round_on_gpu

        round_on_gpu(block, errors)
    else:
        inverse, middle, scale = (each.cpu() for each in block.parameters)
        shares = None if block.shares is None else block.shares.cpu()
        before = None if block.before is None else block.before.cpu()
        groups = block.groups.cpu()
        here = GridBlock(block.current.cpu(), (inverse, middle, scale), groups, block.levels, shares, before)
        lost = errors.cpu()
        grid_columns.round_columns(here, lost)
        block.current.copy_(here.current)
        errors.copy_(lost)
