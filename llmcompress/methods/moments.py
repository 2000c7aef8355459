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

from llmcompress.runtime.devices import finish_here
from llmcompress.runtime.precision import bfloat16_factors, full_float32

STATISTICS = frozenset({"square", "outer", "cross"})

TILE = 256  # columns of a symmetric product at a time
_DERIVING = RLock()

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens; a statistic that was not requested is None.

    `tokens`: total token weight. `square` `[in]`: sums of x^2. `outer` `[in, in]`: X^T X. `cross` `[in, in]`:
    X_dense^T X, with the inputs of the dense model.
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
        """Return the moments of `x [tokens, in]`; see `RunningMoments.add`."""
        sums = RunningMoments(needs)
        sums.add(x, weights, dense_inputs)
        return sums.moments()

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of tokens."""

        def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return a if b is None else b if a is None else a + b

        return Moments(
            self.tokens + other.tokens,
            plus(self.square, other.square),
            plus(self.outer, other.outer),
            plus(self.cross, other.cross),
        )

    def times(self, weight: float) -> Moments:
        """Return the moments with every token's weight multiplied by `weight`."""
        square, outer, cross = (
            None if total is None else total * weight for total in (self.square, self.outer, self.cross)
        )
        return Moments(self.tokens * weight, square, outer, cross)

    def memo(self, key: Any, compute: Callable[[], T]) -> T:
        """Return `compute()`, remembered under `key` for every layer that reads this input."""
        with _DERIVING:  # layers beside each other wait for it
            if key not in self.derived:
                result = compute()
                finish_here()
                self.derived[key] = result
            return self.derived[key]


@dataclass(eq=False)
class RunningMoments:
    """Moments that grow batch by batch, in place: matrices may be a third of a run's memory.

    `needs`: the statistics to sum. Of `outer` only the upper half is valid; `moments` completes it.
    """

    needs: frozenset[str]
    tokens: float = 0.0
    square: Tensor | None = None
    outer: Tensor | None = None
    cross: Tensor | None = None

    def add(self, x: Tensor, weights: Tensor | None = None, dense_inputs: Tensor | None = None) -> None:
        """Add `x [tokens, in]`, with token `weights [tokens]`; `dense_inputs` like x, for `cross`.

        Sums are float32 whatever the dtype of `x`; bfloat16 inputs are faster.
        """
        tokens, dtype = float(len(x)), x.dtype
        if weights is not None and bool((weights != 1).any()):
            tokens = float(weights.sum())
            root = weights.float().sqrt()[:, None]
            x = x * root
            dense_inputs = None if dense_inputs is None else dense_inputs * root
        self.tokens += tokens
        width = x.shape[1]
        if "square" in self.needs:
            self.square = _room(self.square, x, width)
            self.square += x.float().square().sum(0)
        if "outer" in self.needs:
            self.outer = _room(self.outer, x, width, width)
            _add_product(self.outer, x, None, dtype)
        if "cross" in self.needs and dense_inputs is not None:
            self.cross = _room(self.cross, x, width, width)
            _add_product(self.cross, x, dense_inputs, dtype)

    def moments(self) -> Moments:
        """Return the moments of all tokens added, in the same memory."""
        if self.outer is not None:
            mirror(self.outer)
        return Moments(self.tokens, self.square, self.outer, self.cross)


def _room(total: Tensor | None, x: Tensor, *size: int) -> Tensor:
    return x.new_zeros(size, dtype=torch.float32) if total is None else total


def _add_product(total: Tensor, x: Tensor, left: Tensor | None, dtype: torch.dtype) -> None:
    """Add `left^T x` to `total [in, in]`; without `left`, at least the upper half of `x^T x`.

    `dtype`: of the inputs before they were weighted; its precision is enough.
    """
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        from llmcompress.kernels.cpu import gram  # loads LLVM, which reading a recipe need not wait for

        if gram.supports_width(x.shape[1]):
            gram.add_gram(total, x.to(dtype), None if left is None else left.to(dtype))
            return
    if dtype == torch.bfloat16 and x.is_cuda and torch.version.hip is None:
        short = x.to(dtype)  # whose products tensor cores sum in float32
        total += torch.mm((short if left is None else left.to(dtype)).T, short, out_dtype=torch.float32)
        return
    x = x.float()  # float16 squares overflow from 256 on
    with bfloat16_factors() if dtype == torch.bfloat16 else nullcontext(), full_float32(x.device):
        if left is not None:
            total.addmm_(left.float().T, x)
        elif x.is_cuda:
            total.addmm_(x.T, x)  # both halves sooner than it is asked for many tiles
        else:
            add_in_tiles(total, x)


def add_in_tiles(total: Tensor, x: Tensor) -> None:
    """Add the upper half of `x^T x` to `total [in, in]`."""
    width = x.shape[1]
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def mirror(square: Tensor) -> None:
    """Make a matrix `[in, in]` symmetric by its upper half, in place."""
    width = len(square)
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        inside = square[start:stop, start:stop]
        inside.copy_(inside.triu() + inside.triu(1).T)
        square[stop:, start:stop] = square[start:stop, stop:].T


def capped_weights(x: Tensor, cap: float) -> Tensor:
    """Return token weights `[sequences, length]` for `x [sequences, length, in]` that cap the norms of tokens.

    A norm is limited to `cap` times the median of its sequence. The first token can carry 99.9 % of a layer's energy;
    uncapped, it alone would decide the fit.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    limit = cap * norm.median(dim=1, keepdim=True).values
    return (limit / norm.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0).square()
