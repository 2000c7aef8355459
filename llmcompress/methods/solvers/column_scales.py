"""Factors of input columns beside what rows store: `W ~ inner * columns`, as ARB-RC has them (arXiv 2410.03129).

A column's factor costs 16 bits for a whole column, 16 / out a weight. In the feedback loop it is fitted to the column
as it is when the loop reaches it, which carries all earlier feedback. Afterwards all factors together are a linear
least-squares problem under H: with the stored values P `[out, in]`, the best ones solve (H o P^T P) c = diag(P^T W H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.methods.solvers.feedback import Projection
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Grid, ScaledInputs, Sum, Weight, Where, rebuild, unknown

TURNS = 5  # of a column's factor and its nearest points, where these are more than a sign


class ColumnScales:
    """A `Projection` around another: a factor for every column, times what the other one makes of the rest.

    Where a run of columns starts, their factors are those of the best rank-one matrix to the magnitudes there
    (`rank_one`); the other projection then fits its parameters to the columns without their factors. To it an error in
    a column costs its factor, squared, times as much: `make(energy, pivots)` gets tensors `[in]` that are kept up to
    date with that. All runs of the other one, its groups and choices, have one length.
    """

    def __init__(
        self, make: Callable[[Tensor, Tensor], Projection], energy: Tensor, pivots: Tensor, rounds: int
    ) -> None:
        self.given, self.rounds = (energy, pivots), rounds
        self.energy, self.pivots = energy.clone(), pivots.clone()
        self.inner = make(self.energy, self.pivots)
        self.strides = self.inner.strides
        self.columns = torch.ones(len(energy), dtype=torch.float16, device=energy.device)

    def begin(self, column: int, current: Tensor) -> None:
        """Starts the factors of a run of columns, and has the rest fitted."""
        run = max(self.strides)
        if column % run:
            return
        part = slice(column, column + run)
        energy, pivots = self.given
        factors = rank_one(current[part].abs(), energy[part], self.rounds)
        self.columns[part] = factors.to(torch.float16)
        self.energy[part], self.pivots[part] = energy[part] * factors.square(), pivots[part] / factors.square()
        bare = current.clone()
        bare[part] /= factors[:, None]
        self.inner.begin(column, bare)

    def project(self, column: int, values: Tensor) -> Tensor:
        """The nearest values, for the factor that fits them best."""
        factor = self.columns[column].float()
        points = self.inner.project(column, values / factor)
        for _ in range(TURNS):
            energy = points.square().sum()
            refit = torch.where(energy > 0, (values * points).sum() / energy.clamp_min(1e-30), factor)
            refit = refit.to(torch.float16)
            if refit == self.columns[column] or not refit.isfinite():
                break
            self.columns[column] = refit
            if refit == 0:
                break
            points = self.inner.project(column, values / refit.float())
        return points * self.columns[column].float()

    def weight(self, values: Tensor) -> Weight:
        """`ScaledInputs`, of what the other projection stores."""
        return ScaledInputs(self.inner.weight(divide_columns(values, self.columns)), self.columns)


def rank_one(magnitudes: Tensor, energy: Tensor, rounds: int) -> Tensor:
    """Factors c `[columns]`, of mean one, of the rank-one matrix c r^T nearest to `magnitudes [columns, out]`.

    Each column is weighted by its `energy [columns]`; the two factors take turns, none of which loses. A column of
    zeros has the factor 1.
    """
    columns = torch.ones_like(energy)
    for _ in range(rounds):
        rows = (energy * columns) @ magnitudes / (energy * columns.square()).sum().clamp_min(1e-30)
        columns = magnitudes @ rows / rows.square().sum().clamp_min(1e-30)
        columns = columns / columns.mean().clamp_min(1e-30)
    smallest = torch.finfo(torch.float16).tiny
    return torch.where(columns > smallest, columns.clamp_max(torch.finfo(torch.float16).max), 1.0)


def refit_columns(w: ScaledInputs, target: Tensor, hessian: Tensor, shown: Tensor | None = None) -> ScaledInputs:
    """`w` with the factors of columns that least squares gives for `target [out, in]` under `hessian [in, in]`.

    `shown` is what of `w` counts. Factors stay positive: a column whose factor would not be has its signs turned
    round. Where float16 would raise the loss, `w` stays as it is. Raises TypeError where signs cannot be turned.
    """
    values = dense(w.inner) if shown is None else dense(w.inner) * shown
    before = w.columns.double()
    pull = (values * ((target - values * w.columns.float()) @ hessian)).sum(0).double()
    gram = hessian.double() * (values.T @ values).double()
    energy = gram.diagonal()
    gram.diagonal().add_(torch.where(energy > 0, 1e-9 * energy, 1.0))
    wanted = before + torch.linalg.solve(gram, pull)
    after = wanted.clamp(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max).to(torch.float16)
    change = after.double() - before
    if not bool(change @ gram @ change < 2 * change @ pull):
        return w
    return ScaledInputs(flip_columns(w.inner, after < 0), after.abs())


def flip_columns(w: Weight, turned: Tensor) -> Weight:
    """`w` with the signs of the columns `turned`, bool `[in]`, turned round. Raises TypeError where it cannot be."""
    match w:
        case Grid(codes=codes, zero=None, levels=levels):
            return replace(w, codes=torch.where(turned, levels - 1 - codes, codes))
        case Sum() | Where():
            return rebuild(w, lambda path, node, shown: flip_columns(node, turned))
    raise unknown("mirrored", w)


def divide_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Values `[out, in]` divided by their columns' factors; 0 where a factor is."""
    return torch.where(columns == 0, 0.0, values / columns.float())
