"""Straight-through estimators: whole numbers on the way forward, a slope that is not zero on the way back.

A latent is a real number in code units, so that code k owns the cell [k - 1/2, k + 1/2). Going forward it becomes a
code; going backward the gradient of the code is multiplied by a slope, the derivative of a smooth stand-in:

- plain: 1 within the outermost cells' edges, 0 beyond (arXiv 1308.3432, clipped).
- reste (arXiv 2308.06689): of sign(x) |x|^(1/power); near 0, |x| < 0.1, its mean slope there; 0 beyond plain's range.
- biper (arXiv 2404.01278): of sin(FREQUENCY x); the code is the sine's sign, so latents that run far away come around.

The last two are for two levels, seen as x = -1 and x = +1, and behave as plain with more. They differ from the papers
in the unit of x, which is the weights' own there and binary values here. So ReSTE's range is the two cells, |x| <= 2,
instead of |x| <= 1.5, and BiPer's frequency is fixed: its half period is a cell's width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

Estimator = Literal["plain", "reste", "biper"]
ESTIMATORS: tuple[Estimator, ...] = ("plain", "reste", "biper")
NEAR_ZERO = 0.1  # where ReSTE's own slope would grow without bound
FREQUENCY = math.pi / 4  # the sine keeps its sign over a cell, and its slope over a stored code, x = +-1, is not zero


def nearest_codes(latent: Tensor, levels: int, estimator: Estimator = "plain") -> Tensor:
    """Return the codes of latents of any shape, whole numbers in [0, levels) in the latents' own dtype."""
    if estimator == "biper" and levels == 2:
        return (torch.sin(FREQUENCY * (2 * latent - 1)) >= 0).to(latent.dtype)
    return (latent + 0.5).floor().clamp(0, levels - 1)


def slope(latent: Tensor, levels: int, estimator: Estimator = "plain", power: float = 3.0) -> Tensor:
    """Return the estimator's d code / d latent, shaped as the latents. `power`: of ReSTE, 1 is plain."""
    x = 2 * latent - 1
    if estimator == "biper" and levels == 2:
        return FREQUENCY * torch.cos(FREQUENCY * x)
    inside = ((latent >= -0.5) & (latent <= levels - 0.5)).to(latent.dtype)
    if estimator == "reste" and levels == 2:
        steep = x.abs().clamp_min(NEAR_ZERO) ** (1 / power - 1)
        return inside * torch.where(x.abs() < NEAR_ZERO, steep, steep / power)
    return inside


def straight_codes(latent: Tensor, levels: int, estimator: Estimator = "plain", power: float = 3.0) -> Tensor:
    """Return `nearest_codes`, with the gradient of the codes times `slope`."""
    codes: Tensor = _Codes.apply(latent, levels, estimator, power)
    return codes


def straight_cast(master: Tensor, dtype: torch.dtype, lowest: float | None = None) -> Tensor:
    """Round a master to `dtype`, and return it in the master's dtype; the gradient passes unchanged.

    Values are clamped to the largest of `dtype` and to `lowest`; the gradient passes there too, so that an optimizer
    can bring them back.
    """
    values: Tensor = _Cast.apply(master, dtype, lowest)
    return values


class _Codes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: int, estimator: Estimator, power: float) -> Tensor:
        ctx.save_for_backward(latent)
        ctx.form = (levels, estimator, power)
        return nearest_codes(latent, levels, estimator)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient * slope(*ctx.saved_tensors, *ctx.form), None, None, None


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, dtype: torch.dtype, lowest: float | None) -> Tensor:
        most = torch.finfo(dtype).max
        return master.clamp(-most if lowest is None else lowest, most).to(dtype).to(master.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None
