"""Fitting floats of few bits: the scale of a group by search, and every weight to the nearest number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from llmcompress.weight.expression import float_values
from llmcompress.weight.nodes import FloatFormat, Minifloat, ScaleFormat, float_codes

FloatName = Literal["mxfp4", "mxfp6", "mxfp8", "nvfp4", "fp8", "fp8_tensor"]
ROWS = 1024  # fitted at once, at 47 bytes a weight
HEADROOM = 2  # times that groups may grow by feedback, and the factor of the matrix still has a scale for them


@dataclass(frozen=True)
class FloatLayout:
    """The formats of weights and scales, and which scales are tried.

    `group_size`: input columns that share a scale, None for the whole row; `of_all`: true if all rows share them.
    `tried` counts codes of scales from the largest scale that does not reach above the group's largest magnitude.
    """

    form: FloatFormat
    scales: ScaleFormat
    group_size: int | None
    tried: tuple[int, ...] = (-1, 0, 1)
    of_all: bool = False

    def group(self, width: int) -> int:
        """Columns per group in a row of `width`; the last group may have fewer."""
        return width if self.group_size is None else self.group_size

    @property
    def has_factor(self) -> bool:
        """True if a factor of the whole matrix multiplies the scales."""
        return self.scales == "e4m3"

    @property
    def rowwise(self) -> bool:
        """True if no row says what another one is stored as."""
        return not (self.has_factor or self.of_all)


BFLOATS = (0, *range(1, 129, 16))  # an octave of bfloat16 scales: wider ones only make the same numbers smaller
LAYOUTS: dict[FloatName, FloatLayout] = {
    "mxfp4": FloatLayout("e2m1", "e8m0", 32),
    "mxfp6": FloatLayout("e2m3", "e8m0", 32),
    "mxfp8": FloatLayout("e4m3", "e8m0", 32),
    "nvfp4": FloatLayout("e2m1", "e4m3", 16, (-3, -2, -1, 0, 1)),
    "fp8": FloatLayout("e4m3", "bfloat16", None, BFLOATS),
    "fp8_tensor": FloatLayout("e4m3", "bfloat16", None, BFLOATS, of_all=True),
}


def float_sketch(shape: tuple[int, int], layout: FloatLayout) -> Minifloat:
    """Return floats of a layout without values, for `plan` to count their bits."""
    rows, width = shape
    size = layout.group(width)
    scales = (1 if layout.of_all else rows, -(-width // size))
    kind = torch.bfloat16 if layout.scales == "bfloat16" else torch.uint8
    factor = torch.empty(1, device="meta") if layout.has_factor else None
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    return Minifloat(codes, torch.empty(scales, dtype=kind, device="meta"), factor, layout.form, layout.scales, size)


def tensor_factor(largest: Tensor, layout: FloatLayout) -> Tensor | None:
    """Return the factor, float32 `[1]`, of a matrix with this `largest` magnitude; None for a layout without one.

    It is a power of two, so that its reciprocal and its products with scales are exact, and leaves HEADROOM above the
    largest scale.
    """
    if not layout.has_factor:
        return None
    reach = magnitudes(layout.form, largest.device)[-1] * magnitudes(layout.scales, largest.device)[-1]
    exponent = torch.frexp(HEADROOM * largest.float() / reach).exponent.clamp(-100, 100)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(reach), exponent), 1.0).reshape(1)


def fit_scales(
    weight: Tensor, layout: FloatLayout, factor: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scales for `weight [rows, columns]` as stored, and in float32 times `factor`; `[rows or 1, groups]`.

    They leave the least squared error of those tried, columns weighted by `importance [columns]`. The first column
    starts a group.
    """
    rows, width = weight.shape
    if layout.of_all:  # one long row
        everywhere = None if importance is None else importance.expand(rows, width).reshape(-1)
        return fit_scales(weight.reshape(1, -1), replace(layout, of_all=False), None, everywhere)
    size = layout.group(width)
    groups = _in_groups(weight, size)  # [rows, groups, size]
    counted = 1.0 if importance is None else _in_groups(importance[None].to(weight.dtype), size)
    numbers, scales = magnitudes(layout.form, weight.device), magnitudes(layout.scales, weight.device)
    known = scales if factor is None else scales * factor
    clipping = torch.searchsorted(known, groups.abs().amax(2) / numbers[-1], right=True) - 1
    tried = torch.stack([(clipping + offset).clamp(0, len(scales) - 1) for offset in layout.tried])
    lost = [
        (numbers[_places(groups, numbers, steps)] * steps - groups.abs()).square().mul(counted).sum(2)
        for steps in known[tried][..., None]
    ]
    best = tried.gather(0, torch.stack(lost).argmin(0, keepdim=True))[0]
    stored = scales[best].bfloat16() if layout.scales == "bfloat16" else best.to(torch.uint8)
    return stored, known[best]


def nearest_floats(weight: Tensor, layout: FloatLayout) -> Minifloat:
    """Return `weight [out, in]` in a layout, each group with the scale of the least squared error among those tried."""
    floats = float_sketch((weight.shape[0], weight.shape[1]), layout)
    codes, scale = (torch.empty_like(part, device=weight.device) for part in (floats.codes, floats.scale))
    factor = tensor_factor(torch.stack(weight.aminmax()).abs().max(), layout)
    together = len(weight) if layout.of_all else ROWS
    for start in range(0, len(weight), together):
        rows = slice(start, start + together)
        scale[rows], steps = fit_scales(weight[rows], layout, factor)
        codes[rows] = codes_of(weight[rows], layout.form, steps, floats.group_size)
    return replace(floats, codes=codes, scale=scale, tensor_scale=factor)


def codes_of(weight: Tensor, form: FloatFormat, steps: Tensor, group_size: int) -> Tensor:
    """Return the codes of the numbers nearest to `weight [out, in]`, uint8, under `steps [out or 1, groups]`.

    A tie goes to the smaller magnitude.
    """
    groups, numbers = _in_groups(weight, group_size), magnitudes(form, weight.device)
    codes = _places(groups, numbers, steps[..., None])
    signs = float_codes(form) // 2 * ((groups < 0) & (codes > 0))
    return (codes + signs).flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def points_of(values: Tensor, form: FloatFormat, steps: Tensor) -> Tensor:
    """Return the numbers nearest to `values`; `steps`: one for each value, or for all."""
    numbers = magnitudes(form, values.device)
    return (numbers[_places(values, numbers, steps)] * steps).copysign_(values)


@lru_cache(maxsize=16)
def magnitudes(form: FloatFormat | ScaleFormat, device: torch.device) -> Tensor:
    """Return the finite numbers of a format that are not negative, float32, in the order of their codes."""
    if form == "bfloat16":
        return torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float().to(device)
    numbers = float_values(form)[: float_codes(form) if form == "e8m0" else float_codes(form) // 2]
    return numbers[numbers.isfinite()].to(device)


def _in_groups(matrix: Tensor, size: int) -> Tensor:
    """`matrix [rows, columns]` as `[rows, groups, size]`, filled up with zeros."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size)).unflatten(1, (-1, size))


def _places(values: Tensor, numbers: Tensor, steps: Tensor) -> Tensor:
    """Return the places of the `numbers` nearest to the magnitudes of `values` divided by `steps`."""
    scaled = torch.where(steps > 0, values.abs() / steps, 0.0)
    return torch.bucketize(scaled, (numbers[1:] + numbers[:-1]) / 2)
