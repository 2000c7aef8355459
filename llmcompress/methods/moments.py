"""Statistics of a layer's inputs: sums over tokens, so batches, shards and ranks add.

X is `[tokens, in]`. A token may carry a weight w: its row counts as sqrt(w) * x in the second moments.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmcompress.runtime.precision import bfloat16_factors, full_float32
from llmcompress.runtime.side_by_side import finish_here

STATISTICS = frozenset({"square", "outer", "cross"})

TILE = 256  # columns of a symmetric product at a time
_DERIVING = RLock()

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens; a statistic that was not requested is None.

    `tokens`: total token weight. `square` `[in]`: sums of x^2. `outer` `[in, in]`: X^T X. `cross` `[in, in]`:
    X_dense^T X, the inputs that the dense model would have seen against those seen.
    """

    tokens: float
    square: Tensor | None = None
    outer: Tensor | None = None
    cross: Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        x: Tensor, needs: frozenset[str], weights: Tensor | None = None, dense_inputs: Tensor | None = None
    ) -> Moments:
        """The moments of `x [tokens, in]`, with token `weights [tokens]`; `dense_inputs` like x, for `cross`.

        Summed in float32 whatever the dtype of `x`; of bfloat16 inputs, as a bfloat16 forward reads them, faster.
        """
        tokens, dtype = float(len(x)), x.dtype
        if weights is not None and bool((weights != 1).any()):
            tokens = float(weights.sum())
            root = weights.float().sqrt()[:, None]
            x = x * root
            dense_inputs = None if dense_inputs is None else dense_inputs * root
        x = x.float()  # float16 squares overflow from 256 on
        dense_inputs = None if dense_inputs is None else dense_inputs.float()
        gram = in_one if x.is_cuda else in_tiles
        with bfloat16_factors() if dtype == torch.bfloat16 else nullcontext(), full_float32(x.device):
            return Moments(
                tokens,
                square=x.square().sum(0) if "square" in needs else None,
                outer=gram(x) if "outer" in needs else None,
                cross=dense_inputs.T @ x if "cross" in needs and dense_inputs is not None else None,
            )

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of tokens."""

        def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return a if b is None else b if a is None else a + b

        return Moments(
            self.tokens + other.tokens,
            plus(self.square, other.square),
            plus(self.outer, other.outer),
            plus(self.cross, other.cross),
        )

    def scaled(self, weight: float) -> Moments:
        """The moments with every token's weight multiplied by `weight`."""
        square, outer, cross = (
            None if found is None else found * weight for found in (self.square, self.outer, self.cross)
        )
        return Moments(self.tokens * weight, square, outer, cross)

    def memo(self, key: Any, compute: Callable[[], T]) -> T:
        """`compute()`, remembered under `key` for every layer that reads this input (a Cholesky factor, say)."""
        with _DERIVING:  # layers beside each other wait for it
            if key not in self.derived:
                found = compute()
                finish_here()
                self.derived[key] = found
            return self.derived[key]


def in_one(x: Tensor) -> Tensor:
    """Return X^T X `[in, in]` by one product: a GPU does both halves sooner than it is asked for many tiles."""
    return x.T @ x


def in_tiles(x: Tensor) -> Tensor:
    """Return X^T X `[in, in]`, its upper half computed and mirrored."""
    width = x.shape[1]
    outer = x.new_empty(width, width)
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        outer[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        outer[stop:, start:stop] = outer[start:stop, stop:].T
    return outer


def capped_weights(x: Tensor, cap: float) -> Tensor:
    """Token weights `[sequences, length]` that limit the norm of a token of `x [sequences, length, in]` to `cap`
    times the median norm of its sequence.

    The first token of a sequence can carry 99.9 % of a layer's energy; uncapped, it alone would decide the fit.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    limit = cap * norm.median(dim=1, keepdim=True).values
    return (limit / norm.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0).square()
