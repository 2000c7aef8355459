"""What the driver asks of blocks that learn while a model is compressed, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmcompress.calibrate.walk import Block
from llmcompress.weight.modules import CompressedLinear


@dataclass(frozen=True, eq=False)
class Tuned:
    """What blocks learned: their compressed linears and other parameters by name, and in `found` what became of the
    error, `before` and `after`."""

    linears: dict[str, CompressedLinear]
    dense: dict[str, Tensor]
    found: dict[str, Any]


@dataclass(frozen=True)
class Tune:
    """How blocks learn once their layers are set, in place: `learn(blocks, dense weights by name, how many sequences
    are held out)`, with blocks that follow each other: `window` of them, 1 or 2, in the end; with `between`, also one
    alone after each group of its layers with a common input. `batch_size`: of a forward."""

    learn: Callable[[tuple[Block, ...], Mapping[str, Tensor], int], Tuned]
    between: bool
    batch_size: int
    window: int
