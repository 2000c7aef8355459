"""The codes of tiles that are nearest to numbers wanted: the search of `kernels/column_block.py`, on rings.

A ring has no start, so a first search over its last and first quarter finds the state in between, where steps on both
sides have their say, and a second one goes once around, from this state to this state. All tiles are searched at once,
each a stream of its own; with 2^16 states a tile takes a core some 5 ms.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.solvers.stream_search import choose_columns
from llmcompress.weight.tiles import MEMORY, STEPS, numbers
from llmcompress.weight.trellis import Trellis

MOST_BITS = 6


def nearest_tiles(wanted: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 `[..., 256]`, for tiles that would like to be `wanted`, float32 alike, step by step."""
    tiles, quarter = wanted.reshape(-1, STEPS), STEPS // 4
    seam = torch.cat([tiles[:, -quarter:], tiles[:, :quarter]], 1)
    free = torch.tensor([0, -1], dtype=torch.int32, device=tiles.device).repeat(len(tiles), 1)
    meeting = _states(seam, bits, free)[:, quarter - 1 : quarter]
    found = _states(tiles, bits, meeting.expand(-1, 2)) & ((1 << bits) - 1)
    return found.to(torch.uint8).reshape(wanted.shape)


def _states(wanted: Tensor, bits: int, ends: Tensor) -> Tensor:
    """Return the states of each row of `wanted [tiles, steps]`; `ends [tiles, 2]`: those before it and after it."""
    (count, steps), kinds = wanted.shape, _numbers(bits, wanted.device)
    ones = torch.ones(wanted.numel(), device=wanted.device)
    block = ColumnBlock(
        wanted.reshape(1, -1).clone(),
        whole_weights(ones, kinds.trellis),
        ones,
        tuple(range(0, wanted.numel() + 1, steps)),
        ends.T.contiguous(),
    )
    return choose_columns(block, kinds)[0].reshape(count, steps)


@lru_cache(maxsize=MOST_BITS)
def _numbers(bits: int, device: torch.device) -> Numbers:
    return Numbers.on(device, Trellis(bits, 1, MEMORY), numbers()[:, None])
