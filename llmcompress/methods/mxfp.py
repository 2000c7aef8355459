"""Microscaling floats (OCP Microscaling specification 1.0, arXiv 2310.10537): round to nearest in scaled groups.

Minimises |W - W_approx|^2 for each row and group; needs no data. The specification takes the scale whose exponent is
that of the group's largest magnitude. Here the neighbours of the scale that just covers this magnitude are tried as
well, and the one with the least squared error is stored. A tie between two floats goes to the smaller magnitude.
Stores a `Minifloat`:

- mxfp4, mxfp6, mxfp8: e2m1, e2m3 or e4m3 floats in groups of 32 with e8m0 scales, 4.25, 6.25 or 8.25 bits a weight.
- nvfp4: e2m1 floats in groups of 16 with e4m3 scales, 4.5 bits a weight, and one float32 factor of the matrix, by which
  the scale of the group with the largest magnitude is the largest that e4m3 has.

A base that was pruned before stays pruned: only what is kept is fitted and stored.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.layer import Layer, StepConfig, base_target, join, method, split, support, with_base
from llmcompress.weight.expression import float_values
from llmcompress.weight.nodes import FloatFormat, Minifloat, Weight, Where, Zero, float_codes, shape


@dataclass(frozen=True)
class FloatLayout:
    """The formats of weights and scales, and which scales are tried.

    `tried` counts codes of scales from the largest scale that does not reach above the group's largest magnitude.
    """

    form: FloatFormat
    scales: FloatFormat
    group_size: int
    tried: tuple[int, ...] = (-1, 0, 1)


LAYOUTS = {
    "mxfp4": FloatLayout("e2m1", "e8m0", 32),
    "mxfp6": FloatLayout("e2m3", "e8m0", 32),
    "mxfp8": FloatLayout("e4m3", "e8m0", 32),
    "nvfp4": FloatLayout("e2m1", "e4m3", 16, (-3, -2, -1, 0, 1)),
}


class MXFP(StepConfig):
    """Arguments of `mxfp`."""

    method: Literal["mxfp"] = "mxfp"
    format: Literal["mxfp4", "mxfp6", "mxfp8", "nvfp4"] = Field("mxfp4", description="of weights and their scales")
    examples = ({}, {"format": "nvfp4"}, {"format": "mxfp8"}, {"format": "mxfp6"})

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return self.format != "nvfp4"  # which has a factor of the whole matrix

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        (base, term), layout = split(approx), LAYOUTS[self.format]
        rows, width = shape(base)
        codes = torch.empty(rows, width, dtype=torch.uint8, device="meta")
        scale = torch.empty(rows, -(-width // layout.group_size), dtype=torch.uint8, device="meta")
        factor = torch.empty(1, device="meta") if layout.scales == "e4m3" else None
        floats = Minifloat(codes, scale, factor, layout.form, layout.scales, layout.group_size)
        return join(in_place_of_kept(base, floats), term)


@method("mxfp", MXFP)
def mxfp(layer: Layer, config: MXFP) -> Layer:
    """Rounds the base to floats of few bits."""
    target, kept = base_target(layer), support(layer.approx)
    floats = nearest_floats(target if kept is None else target * kept, LAYOUTS[config.format])
    return with_base(layer, in_place_of_kept(split(layer.approx)[0], floats))


def in_place_of_kept(base: Weight, floats: Minifloat) -> Weight:
    """Return `floats`, within the support of a base that is pruned."""
    match base:
        case Where(index, _, Zero() as outside):
            return Where(index, floats, outside)
    return floats


def nearest_floats(weight: Tensor, layout: FloatLayout) -> Minifloat:
    """Return `weight [out, in]` in a layout, each group with the scale of the least squared error among those tried."""
    size, width = layout.group_size, weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -width % size)).unflatten(1, (-1, size))  # [out, groups, size]
    numbers, scales = _magnitudes(layout.form, weight.device), _magnitudes(layout.scales, weight.device)
    covering = groups.abs().amax(2) / numbers[-1]
    factor = None
    if layout.scales == "e4m3":
        factor = (covering.max() / scales[-1]).reshape(1)
        factor = torch.where(factor > 0, factor, 1.0)
        scales = scales * factor
    clipping = torch.searchsorted(scales, covering, right=True) - 1
    tried = torch.stack([(clipping + offset).clamp(0, len(scales) - 1) for offset in layout.tried])
    lost = [
        (numbers[_nearest(groups, numbers, steps)] * steps - groups.abs()).square().sum(2)
        for steps in scales[tried][..., None]
    ]
    scale = tried.gather(0, torch.stack(lost).argmin(0, keepdim=True))[0]
    codes = _nearest(groups, numbers, scales[scale][..., None])
    signs = float_codes(layout.form) // 2 * ((groups < 0) & (codes > 0))
    codes = (codes + signs).flatten(1)[:, :width]
    return Minifloat(codes.to(torch.uint8), scale.to(torch.uint8), factor, layout.form, layout.scales, size)


def _magnitudes(form: FloatFormat, device: torch.device) -> Tensor:
    """The finite numbers of a format that are not negative, in order, which is that of their codes."""
    numbers = float_values(form)[: float_codes(form) if form == "e8m0" else float_codes(form) // 2]
    return numbers[numbers.isfinite()].to(device)


def _nearest(groups: Tensor, numbers: Tensor, steps: Tensor) -> Tensor:
    """The places of the `numbers` that come nearest to the magnitudes of `groups`, divided by `steps`."""
    scaled = torch.where(steps > 0, groups.abs() / steps, 0.0)
    return torch.bucketize(scaled, (numbers[1:] + numbers[:-1]) / 2)
