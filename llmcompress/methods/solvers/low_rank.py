"""Factors of low rank: B `[out, r]` and A `[r, in]` for what a base lost, or for a whole matrix, in any metric S S^T.

With E the matrix to approximate and U the leading left singular vectors of E S, the product is `B A = U (U^T E)`: S
needs no inverse. The loss left is exactly the tail of the squared singular values of E S.
"""

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, join
from llmcompress.methods.solvers.grid import GridFormat, fit_grid, grid_of, grid_sketch
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Dense, Grid, LowRank, Weight, shape

LEAST_SCALE = 2.0**-24  # the smallest number of float16


class LowRankConfig(StepConfig):
    """Arguments of every low-rank method."""

    rank: int | None = Field(None, ge=1, description="columns of the left factor")
    share: float | None = Field(None, gt=0, le=1, description="rank from bits: this share of what the base stores")
    factor_bits: Literal[4, 8, 16] = Field(8, description="16 keeps bfloat16")
    damping: float = Field(0.01, gt=0, le=10, description="share of the mean Hessian diagonal that is added")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.rank is None) == (self.share is None):
            raise ValueError("give either rank or share")
        return self

    def rank_for(self, base: Weight) -> int:
        """The rank for a base. Raises RecipeError for a rank larger than the matrix."""
        out, width = shape(base)
        if self.rank is not None:
            if self.rank > min(out, width):
                raise RecipeError(f"rank {self.rank} is larger than the matrix [{out}, {width}]; lower it")
            return self.rank
        affordable = float(self.share or 0.0) * bits(base) / ((out + width) * self.factor_bits)
        return max(1, min(int(affordable), out, width))

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        base = base_and_term(approx)[0]
        return join(base, self.term_sketch(base))

    def term_sketch(self, base: Weight) -> LowRank:
        """Return the factors for a base, on meta tensors."""
        rank = self.rank_for(base)
        out, width = shape(base)
        if self.factor_bits == 16:
            left, right = (
                torch.empty(size, dtype=torch.bfloat16, device="meta") for size in [(out, rank), (rank, width)]
            )
            return LowRank(Dense(left), Dense(right))
        form = GridFormat(2**self.factor_bits)
        scale = torch.empty(1, 1, dtype=torch.float16, device="meta")
        codes = torch.empty(out, rank, dtype=torch.uint8, device="meta")
        return LowRank(Grid(codes, scale, None, form.levels, rank), grid_sketch((rank, width), form))


def compensate(layer: Layer, config: LowRankConfig, metric: Tensor) -> Layer:
    """The layer with a new low-rank term for what its base lost, best in the norm tr(E metric E^T).

    `metric` float64 is S S^T, `[in, in]`, or the diagonal of a diagonal one, `[in]`. Replaces the term that was there.
    """
    base = base_and_term(layer.approx)[0]
    lost = (layer.weight - dense(base)).double()
    directions = leading_directions(lost, metric, config.rank_for(base))
    term = factors(lost, directions, metric, config.factor_bits)
    return replace(layer, approx=join(base, term))


def leading_directions(lost: Tensor, metric: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors `[out, rank]` of `lost [out, in] @ S`; `metric` as in `compensate`."""
    if len(lost) <= lost.shape[1]:
        return torch.linalg.eigh(_weigh(lost, metric) @ lost.T).eigenvectors[:, -rank:].flip(1)
    # fewer columns than rows: the right singular vectors are the smaller problem
    if metric.ndim == 1:
        whitened = lost * metric.clamp_min(0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(metric)
        whitened = lost @ (vectors * values.clamp_min(0).sqrt())
    right = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(whitened @ right).Q


def factors(lost: Tensor, directions: Tensor, metric: Tensor, factor_bits: int) -> LowRank:
    """`lost [out, in]` projected on `directions [out, rank]`, as stored factors.

    The right factor is rounded first, then the left one is solved again for the rounded right one (least squares
    under `metric`), so that only the left factor's rounding remains. Integer factors have one scale per component, in
    the right factor's rows; the left factor has one scale for all, its columns being brought to one size.
    """
    right = (directions.T @ lost).float()
    if factor_bits == 16:
        stored = right.to(torch.bfloat16)
        return LowRank(Dense(_solve_left(lost, stored.double(), metric).to(torch.bfloat16)), Dense(stored))
    form = GridFormat(2**factor_bits)
    scale, _ = fit_grid(right, form)
    middle = grid_of(right, scale, None, form.levels, right.shape[1])
    size = _solve_left(lost, dense(middle).double(), metric).abs().amax(0).float()[:, None].clamp_min(1e-12)
    scales = (scale.float() * size).clamp_min(LEAST_SCALE)  # a component without one would be lost
    scales = torch.where(scale > 0, scales, 0.0).to(torch.float16)  # but for those beyond the rank of the matrix
    scaled = Grid(middle.codes, scales, None, form.levels, right.shape[1])
    left = _solve_left(lost, dense(scaled).double(), metric).float()
    one, _ = fit_grid(left.reshape(1, -1), form)
    codes = grid_of(left.reshape(1, -1), one, None, form.levels, left.numel()).codes.reshape(left.shape)
    return LowRank(Grid(codes, one, None, form.levels, left.shape[1]), scaled)


def _solve_left(lost: Tensor, right: Tensor, metric: Tensor) -> Tensor:
    """The left factor `[out, rank]` with the least tr(E metric E^T) for a given right factor `[rank, in]`."""
    seen = _weigh(right, metric)
    return lost @ seen.T @ torch.linalg.pinv(seen @ right.T, hermitian=True)


def _weigh(matrix: Tensor, metric: Tensor) -> Tensor:
    """Return `matrix [rows, in]` times the metric."""
    return matrix * metric if metric.ndim == 1 else matrix @ metric
