"""Least squares for the scales of what is stored."""

from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.weight import Grid, TrellisCoded, Weight, Where, dense


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
        case _:
            return w
