"""Least squares for the scales of what is stored, and factors of input columns beside them.

`W ~ inner * columns` has a factor for every column, as ARB-RC (arXiv 2410.03129): 16 bits a column, 16 / out a weight.
In the feedback loop it is fitted to the column as it is when the loop reaches it, which carries all earlier feedback.
Afterwards all factors together are a linear least-squares problem under H: with the stored values P `[out, in]`, the
best ones solve (H o P^T P) c = diag(P^T W H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.methods.solvers.feedback import Projection
from llmcompress.methods.solvers.vectors import refit_entries
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Codebook, Grid, ScaledInputs, Sum, TrellisCodes, Weight, Where, rebuild, unknown

TURNS = 5  # of a column's factor and its nearest points, where these are more than a sign


def refit_scales(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None = None) -> Weight:
    """Return `w` with least-squares scales, one row and group after the other; only the `shown` part of `w` counts.

    Grids that are added up are solved together, and factors of columns come last. Entries of a codebook follow its
    scales; codebooks that are added up take turns.
    """
    match w:
        case Grid(scale=scale) if scale.shape[1] > 1:
            return _refit_together((w,), target, hessian, shown)[0]
        case Grid(scale=scale) | TrellisCodes(scale=scale) | Codebook(scale=scale):
            values = dense(w) if shown is None else dense(w) * shown
            seen = values @ hessian
            energy = (seen * values).sum(1, keepdim=True)
            gain = (seen * target).sum(1, keepdim=True)
            wanted = torch.where(energy > 0, scale.float() * gain / energy.clamp_min(1e-30), scale.float())
            rounded = wanted.clamp(0, torch.finfo(torch.float16).max).to(torch.float16)
            # the loss is a parabola in the factor; rounding to float16 may overshoot its gain
            factor = rounded.float() / scale.float().clamp_min(1e-30)
            better = factor * (factor * energy - 2 * gain) < energy - 2 * gain
            found = replace(w, scale=torch.where(better, rounded, scale))
            return refit_entries(found, target, hessian, shown) if isinstance(found, Codebook) else found
        case Where(index, inside, outside):
            chosen = index.inside.expand(target.shape)
            if shown is not None:
                chosen = chosen & shown
            rest = ~chosen if shown is None else shown & ~chosen
            inside = refit_scales(inside, target - dense(outside).to(target.device) * rest, hessian, chosen)
            outside = refit_scales(outside, target - dense(inside).to(target.device) * chosen, hessian, rest)
            return Where(index, inside, outside)
        case ScaledInputs(inner, columns):
            factors = columns.float()
            inner = refit_scales(inner, divide_columns(target, columns), hessian * torch.outer(factors, factors), shown)
            return refit_columns(ScaledInputs(inner, columns), target, hessian, shown)
        case Sum() if added_grids(w):
            return Sum(_refit_together(added_grids(w), target, hessian, shown))
        case Sum(parts) if all(isinstance(part, Codebook) for part in parts):
            for place in range(len(parts)):
                others = sum(dense(part) for part in (*parts[:place], *parts[place + 1 :]))
                rest = target - (others if shown is None else others * shown)
                parts = (*parts[:place], refit_scales(parts[place], rest, hessian, shown), *parts[place + 1 :])
            return Sum(parts)
        case _:
            return w


def added_grids(w: Weight) -> tuple[Grid, ...]:
    """Return the grids of a sum of grids with equal groups; none for anything else."""
    if not isinstance(w, Sum):
        return ()
    grids = tuple(part for part in w.parts if isinstance(part, Grid))
    alike = {(grid.group_size, tuple(grid.scale.shape), len(grid.codes)) for grid in grids}
    return grids if len(grids) == len(w.parts) and len(alike) == 1 else ()


def _refit_together(grids: tuple[Grid, ...], target: Tensor, hessian: Tensor, shown: Tensor | None) -> tuple[Grid, ...]:
    """Return added grids with new scales, those of a row and group solved for at once, group by group.

    A group keeps its scales if rounding to float16 would leave no gain.
    """
    stored = [dense(grid) if shown is None else dense(grid) * shown for grid in grids]
    pulled = (target - sum(stored)) @ hessian
    refit = []
    for group, start in enumerate(range(0, target.shape[1], grids[0].group_size)):
        part = slice(start, start + grids[0].group_size)
        values, local = torch.stack([each[:, part] for each in stored], 1), hessian[part, part]  # [rows, grids, group]
        gram = ((values @ local) @ values.mT).double()
        pull = (values @ pulled[:, part, None]).double()
        ridge = gram.diagonal(dim1=1, dim2=2).sum(1) * 1e-6  # grids may be alike
        ridge = torch.where(ridge > 0, ridge, 1.0)[:, None, None] * torch.eye(len(grids), device=gram.device)
        share = torch.linalg.solve(gram + ridge, pull)[:, :, 0].float()  # of its scale that a scale moves
        scale = torch.stack([grid.scale[:, group] for grid in grids], 1)
        tried = (scale.float() * (1 + share)).clamp(0, torch.finfo(torch.float16).max).to(torch.float16)
        moved = torch.where(scale > 0, tried.float() / scale.float() - 1, 0.0)
        change = (moved[:, None] @ values)[:, 0]  # [rows, group]
        better = ((change @ local) * change).sum(1) < 2 * (change * pulled[:, part]).sum(1)
        pulled -= (change * better[:, None]) @ hessian[part]
        refit.append(torch.where(better[:, None], tried, scale))
    scales = torch.stack(refit, 2).unbind(1)
    return tuple(replace(grid, scale=scale.contiguous()) for grid, scale in zip(grids, scales, strict=True))


# --- factors of columns -----------------------------------------------------------------------------------------------


class ColumnScales:
    """A `Projection` around an inner one: a factor for every column, times the values of the inner projection.

    Where a run of columns starts, their factors are those of the best rank-one matrix to the magnitudes there
    (`rank_one`); the inner projection is then fitted to the columns divided by them. An error in a column costs its
    factor, squared, times as much there: `make(energy, pivots)` gets tensors `[in]` that follow the factors. All runs
    of the inner projection, its groups and choices, have one length.
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
        """Start the factors of a run of columns, and fit the inner projection."""
        run = max(self.strides)
        if column % run:
            return
        part = slice(column, column + run)
        energy, pivots = self.given
        factors = rank_one(current[part].abs(), energy[part], self.rounds)
        self.columns[part] = factors.to(torch.float16)
        self.energy[part], self.pivots[part] = energy[part] * factors.square(), pivots[part] / factors.square()
        if not column:
            self.bare = torch.empty_like(current)  # of which one run at a time is filled
        torch.div(current[part], factors[:, None], out=self.bare[part])
        self.inner.begin(column, self.bare)

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the nearest values, under the factor that fits them best."""
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
        """Return `ScaledInputs` of the inner expression."""
        return ScaledInputs(self.inner.weight(divide_columns(values, self.columns)), self.columns)


def rank_one(magnitudes: Tensor, energy: Tensor, rounds: int) -> Tensor:
    """Return factors c `[columns]`, of mean one, of the rank-one matrix c r^T nearest to `magnitudes [columns, out]`.

    Columns are weighted by their `energy [columns]`; c and r take turns. A column of zeros has the factor 1.
    """
    columns = torch.ones_like(energy)
    for _ in range(rounds):
        rows = (energy * columns) @ magnitudes / (energy * columns.square()).sum().clamp_min(1e-30)
        columns = magnitudes @ rows / rows.square().sum().clamp_min(1e-30)
        columns = columns / columns.mean().clamp_min(1e-30)
    smallest = torch.finfo(torch.float16).tiny
    return torch.where(columns > smallest, columns.clamp_max(torch.finfo(torch.float16).max), 1.0)


def refit_columns(w: ScaledInputs, target: Tensor, hessian: Tensor, shown: Tensor | None = None) -> ScaledInputs:
    """Return `w` with the factors of columns that least squares gives for `target [out, in]` under `hessian [in, in]`.

    Only the `shown` part of `w` counts. Factors stay positive: a negative one flips the signs of its column. If
    rounding to float16 raises the loss, `w` stays as it is. Raises TypeError if signs cannot be flipped.
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
    """Return `w` with the signs of the columns `turned`, bool `[in]`, flipped. Raises TypeError if they cannot be."""
    match w:
        case Grid(codes=codes, zero=None, levels=levels):
            return replace(w, codes=torch.where(turned, levels - 1 - codes, codes))
        case Sum() | Where():
            return rebuild(w, lambda path, node, shown: flip_columns(node, turned))
    raise unknown("mirrored", w)


def divide_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return values `[out, in]` divided by their columns' factors; 0 where a factor is 0."""
    return torch.where(columns == 0, 0.0, values / columns.float())
