"""Least squares for the scales of what is stored, and for the entries of codebooks."""

from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.methods.solvers.centroids import refit_entries
from llmcompress.methods.solvers.column_scales import divide_columns, refit_columns
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Codebook, Grid, ScaledInputs, Sum, TrellisCodes, Weight, Where


def refit_scales(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None = None) -> Weight:
    """`w` with least-squares scales, a row and group after the other; grids that are added up have theirs together, and
    factors of columns come last. Entries of a codebook follow its scales; codebooks that are added up take turns.

    `shown` is what of `w` counts.
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
    """The grids of a sum of grids whose groups are alike; none of anything else."""
    if not isinstance(w, Sum):
        return ()
    grids = tuple(part for part in w.parts if isinstance(part, Grid))
    alike = {(grid.group_size, tuple(grid.scale.shape), len(grid.codes)) for grid in grids}
    return grids if len(grids) == len(w.parts) and len(alike) == 1 else ()


def _refit_together(grids: tuple[Grid, ...], target: Tensor, hessian: Tensor, shown: Tensor | None) -> tuple[Grid, ...]:
    """Grids added up, with new scales: of each row and group one of every grid, solved for at once, group by group. A
    group whose loss would not fall, by what float16 makes of its scales, keeps those it has."""
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
