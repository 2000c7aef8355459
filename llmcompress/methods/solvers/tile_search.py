"""The codes of tiles that are nearest to numbers wanted: the Viterbi algorithm, on rings.

A ring has no start, so a first search over its last and first quarter finds the state in between, where steps on both
sides have their say, and a second one goes once around, from this state to this state. Tiles are searched side by side,
one a core; with 2^16 states a tile takes about 20 ms of it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from llmcompress.methods.solvers.viterbi import Floats, arranged, compiled
from llmcompress.weight.tiles import MEMORY, STEPS, numbers
from llmcompress.weight.trellis import Trellis

MOST_BITS = 6


def nearest(wanted: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 `[..., 256]`, for tiles that would like to be `wanted`, float32 alike, step by step."""
    asked = wanted.reshape(-1, STEPS, 1).numpy(force=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as workers:
        found = np.stack(list(workers.map(lambda tile: _ring(tile, bits), asked)))
    return torch.from_numpy(found).reshape(wanted.shape).to(wanted.device)


def _ring(tile: Floats, bits: int) -> np.ndarray:
    find, table = compiled(Trellis(bits, 1, MEMORY)), _arranged(bits)
    quarter, one = STEPS // 4, np.ones_like(tile)
    seam = np.concatenate([tile[-quarter:], tile[:quarter]])
    meeting = int(find(seam, one[: len(seam)], table, 0, -1)[quarter - 1])
    codes = find(tile, one, table, meeting, meeting) & ((1 << bits) - 1)
    return codes.astype(np.uint8)


@lru_cache(maxsize=MOST_BITS)
def _arranged(bits: int) -> Floats:
    return arranged(Trellis(bits, 1, MEMORY), numbers()[:, None].numpy())
