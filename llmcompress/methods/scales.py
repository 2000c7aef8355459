"""Least squares for the scales of what is stored."""

from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.weight import Grid, Sum, TrellisCoded, Weight, Where, dense


def rescaled(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None = None) -> Weight:
    """`w` with each row's scales times their least-squares factor, grid by grid; `shown` is what of `w` counts."""
    match w:
        case Grid(scale=scale) | TrellisCoded(scale=scale):
            values = dense(w) if shown is None else dense(w) * shown
            seen = values @ hessian
            energy = (seen * values).sum(1, keepdim=True)
            gain = (seen * target).sum(1, keepdim=True)
            wanted = torch.where(energy > 0, scale.float() * gain / energy.clamp_min(1e-30), scale.float())
            rounded = wanted.clamp(0, torch.finfo(torch.float16).max).to(torch.float16)
            # the loss is a parabola in the factor; rounding to float16 may overshoot its gain
            factor = rounded.float() / scale.float().clamp_min(1e-30)
            better = factor * (factor * energy - 2 * gain) < energy - 2 * gain
            return replace(w, scale=torch.where(better, rounded, scale))
        case Where(index, inside, outside):
            chosen = index.inside.expand(target.shape)
            if shown is not None:
                chosen = chosen & shown
            rest = ~chosen if shown is None else shown & ~chosen
            inside = rescaled(inside, target - dense(outside).to(target.device) * rest, hessian, chosen)
            outside = rescaled(outside, target - dense(inside).to(target.device) * chosen, hessian, rest)
            return Where(index, inside, outside)
        case Sum(parts):
            return Sum(_together(parts, target, hessian, shown))
        case _:
            return w


def _together(parts: tuple[Weight, ...], target: Tensor, hessian: Tensor, shown: Tensor | None) -> tuple[Weight, ...]:
    """Grids added up: the factors of a row's scales, one for each grid, all at once; a row that would lose stays."""
    grids = [part for part in parts if isinstance(part, Grid)]
    if len(grids) < len(parts):
        return parts
    counted = 1 if shown is None else shown
    values = torch.stack([dense(grid) * counted for grid in grids])  # [grids, rows, in]
    missing = target - values.sum(0)
    pulled = missing @ hessian
    pull = (values * pulled).sum(2).T.double()
    gram = torch.einsum("grc,hrc->rgh", values @ hessian, values).double()
    ridge = gram.diagonal(dim1=1, dim2=2).sum(1) * 1e-6  # grids may be alike
    ridge = torch.where(ridge > 0, ridge, 1.0)[:, None, None] * torch.eye(len(grids), device=gram.device)
    move = torch.linalg.solve(gram + ridge, pull[:, :, None]).float()  # [rows, grids, 1]; without a pull, none
    scales = torch.stack([grid.scale for grid in grids], 1)
    most = torch.finfo(torch.float16).max
    tried = torch.addcmul(scales.float(), scales.float(), move).clamp(0, most).to(torch.float16)
    moved = [replace(grid, scale=scale) for grid, scale in zip(grids, tried.unbind(1), strict=True)]
    left = target - torch.stack([dense(grid) * counted for grid in moved]).sum(0)
    better = ((left @ hessian) * left).sum(1) < (pulled * missing).sum(1)
    chosen = torch.where(better[:, None, None], tried, scales)
    return tuple(replace(grid, scale=scale) for grid, scale in zip(grids, chosen.unbind(1), strict=True))
