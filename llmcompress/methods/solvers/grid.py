"""Fitting integer grids: the scale (and zero point) of a group of weights, in closed form or by clip search."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.errors import NumericsError
from llmcompress.methods.layer import StepConfig
from llmcompress.weight.expression import repeat_groups
from llmcompress.weight.nodes import Grid

# Shares of the full range tried by the clip search; fewer levels want a tighter clip.
SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4, 0.3)

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # integers of llama.cpp's IQ4 types
IQ4_LEVELS = IQ4[-1] - IQ4[0] + 1  # of a grid that has them; no other has so many


@dataclass(frozen=True)
class GridFormat:
    """The form of a grid. `group_size`: input columns that share a scale, None for the whole row."""

    levels: int
    group_size: int | None = None
    symmetric: bool = True
    clip: bool = True
    scale: Literal["range", "absmean", "median"] = "range"

    def group(self, width: int) -> int:
        """Columns per group in a row of `width`."""
        return width if self.group_size is None else min(self.group_size, width)


class GridConfig(StepConfig):
    """Arguments of every method that stores integers."""

    bits: int | Literal["ternary"] = Field(3, description="1 to 8, or ternary (three levels in 1.6 bits)")
    group_size: int | None = Field(None, ge=1, description="columns per scale; null for one scale per row")
    symmetric: bool = Field(True, description="levels lie around zero; false: each group stores a zero point too")
    clip: bool = Field(True, description="search the clipping range with the least squared error")
    scale: Literal["range", "absmean", "median"] = Field(
        "range", description="of ternary grids: from the range, or the mean or median magnitude (BitNet b1.58)"
    )
    narrow_range: bool = Field(
        False, description="one level fewer, so that 0 is one of them and integers of `bits` bits hold all"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.bits, int) and not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must lie in 1..8, or be 'ternary'")
        if self.bits in (1, "ternary") and not self.symmetric:
            raise ValueError(f"bits: {self.bits} needs symmetric: true")
        if self.scale != "range" and self.bits != "ternary":
            raise ValueError(f"scale: {self.scale} needs bits: ternary")
        if self.narrow_range and (self.bits in (1, "ternary") or not self.symmetric):
            raise ValueError("narrow_range: true needs symmetric: true and bits from 2 to 8")
        return self

    def grid_format(self) -> GridFormat:
        """Return the format of these arguments."""
        levels = 3 if self.bits == "ternary" else 2 ** int(self.bits) - self.narrow_range
        return GridFormat(levels, self.group_size, self.symmetric, self.clip, self.scale)


def fit_grid(
    weight: Tensor, form: GridFormat, importance: Tensor | None = None, shown: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scale float16 `[rows, 1]` and zero uint8 `[rows, 1]` (None if symmetric) for `weight [rows, columns]`.

    They leave the least squared error, columns weighted by `importance [columns]`; only entries with
    `shown [rows, columns]` count. Two levels have the closed form scale/2 = mean |w|; others search over `SHRINKS` of
    the range, unless the form takes the mean or median of |w| (BitNet b1.58, arXiv 2402.17764).
    Raises NumericsError for a scale outside float16.
    """
    counted = weight.new_ones(1, 1) if importance is None else importance.to(weight.dtype)[None, :]
    if shown is not None:
        counted, weight = counted * shown, weight * shown
    if form.levels == 2:
        share = counted.expand_as(weight)
        mean = (weight.abs() * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp_min(1e-30)
        return float16_scale(2 * mean), None
    if form.scale != "range":
        magnitudes = weight.abs() if shown is None else torch.where(shown, weight.abs(), torch.nan)
        if form.scale == "absmean":
            middle = magnitudes.nanmean(1, keepdim=True)
        else:
            middle = magnitudes.nanmedian(1, keepdim=True).values
        return float16_scale(middle.nan_to_num(0.0)), None  # of no weights at all: 0
    if form.symmetric:
        high = weight.abs().amax(1, keepdim=True)
        low = -high
    else:
        high, low = weight.amax(1, keepdim=True).clamp_min(0), weight.amin(1, keepdim=True).clamp_max(0)
    shrinks = high.new_tensor(SHRINKS if form.clip else (1.0,))[:, None, None]
    scales = float16_scale((high - low) * (shrinks / (form.levels - 1)))  # [shrinks, rows, 1], like what follows
    inverses, zeros = reciprocal(scales), None
    if not form.symmetric:
        zeros = (-low * shrinks * inverses).round_().clamp_(0, form.levels - 1).to(torch.uint8)
    middles = _centres(zeros, form.levels, weight).expand(scales.shape)
    errors = torch.stack(
        [
            _nearest(weight, scale, inverse, middle, form.levels)
            .sub_(weight)
            .square_()
            .mul_(counted)
            .sum(1, keepdim=True)
            for scale, inverse, middle in zip(scales.float(), inverses, middles)
        ]
    )
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], None if zeros is None else zeros.gather(0, best)[0]


def reciprocal(scale: Tensor) -> Tensor:
    """Return `1 / scale` in float32, 0 where the scale is 0."""
    return torch.where(scale > 0, scale.float().reciprocal(), 0.0)


def centre(zero: Tensor | None, levels: int) -> Tensor | float:
    """Return the code that stands for 0."""
    return (levels - 1) / 2 if zero is None else zero.float()


def round_to(weight: Tensor, scale: Tensor, zero: Tensor | None, levels: int) -> Tensor:
    """Return the grid points nearest to `weight [rows, columns]`, float32."""
    return _nearest(weight, scale.float(), reciprocal(scale), _centres(zero, levels, weight), levels)


def _centres(zero: Tensor | None, levels: int, weight: Tensor) -> Tensor:
    """Return `centre` in float32, on the device of `weight`; without zeros it is one number."""
    return torch.as_tensor(centre(zero, levels), dtype=torch.float32, device=weight.device)


def _nearest(weight: Tensor, scale: Tensor, inverse: Tensor, middle: Tensor, levels: int) -> Tensor:
    """Return the grid points nearest to `weight [rows, columns]`, all float32; `inverse`: the scale's `reciprocal`."""
    codes = torch.addcmul(middle, weight, inverse).round_().clamp_(0, levels - 1)
    return codes.sub_(middle).mul_(scale)


def grid_of(values: Tensor, scale: Tensor, zero: Tensor | None, levels: int, group_size: int) -> Grid:
    """Return the `Grid` that holds `values [out, in]`, each at the nearest point."""
    width = values.shape[1]
    middle = centre(None if zero is None else repeat_groups(zero, group_size, width), levels)
    codes = (values * repeat_groups(reciprocal(scale), group_size, width)).add_(middle).round_().clamp_(0, levels - 1)
    return Grid(codes.to(torch.uint8), scale, zero, levels, group_size)


def grid_sketch(shape: tuple[int, int], form: GridFormat) -> Grid:
    """Return a grid of that format without values, for `plan` to count its bits."""
    group = form.group(shape[1])
    parameters = (shape[0], -(-shape[1] // group))
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    scale = torch.empty(parameters, dtype=torch.float16, device="meta")
    zero = None if form.symmetric else torch.empty(parameters, dtype=torch.uint8, device="meta")
    return Grid(codes, scale, zero, form.levels, group)


def float16_scale(scale: Tensor) -> Tensor:
    """Return `scale` as it is stored. Raises NumericsError for one outside float16."""
    half = scale.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise NumericsError(f"a weight group needs the scale {float(scale.max()):g}, which float16 cannot hold")
    return half
