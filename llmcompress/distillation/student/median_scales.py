"""Scales that follow the latents of their codes: the median of the absolute latents, for two and three levels.

BitNet b1.58 (arXiv 2402.17764) recomputes the scale of a ternary matrix from its latent weights in every step, as the
mean of their absolute values; the levels are -scale, 0 and +scale. The median (arXiv 2407.09527) does not depend on how
large the largest are. Such a scale has no gradient of its own, so it cannot oscillate together with the codes, as a
learned one does at two bits (arXiv 2302.02210). Unlike there, a scale here belongs to a group of a row, as stored, and
the median is the lower of the two in the middle.

Latents are held in units of their scale. So when a scale changes, after every step, its latents change in these units,
and the weights that they stand for stay:

    weight = scale * latent        scale <- median |weight|        latent <- weight / scale

Latents are clamped to the cells of the codes, which end at 1.5 times a ternary scale and at twice a binary level. That
is beyond the median, which therefore stays; a mean would shrink with every clamped latent, step after step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.weight.expression import repeat_groups
from llmcompress.weight.nodes import Grid, Weight
from llmcompress.weight.trainable.masters import leaves
from llmcompress.weight.trainable.relax import SMALLEST_SCALE, RelaxedWeight
from llmcompress.weight.trainable.straight_through import straight_cast

MOST_LEVELS = 3


@dataclass(frozen=True, eq=False)
class MedianScale:
    """The scales of one grid of a layer under training, whose parameters' names start with `path`.

    `stored`: bool, broadcasts to the grid's `[out, in]`, True if the element has a code; None: all have. `form`: the
    grid without values.
    """

    relaxed: RelaxedWeight
    path: str
    form: Grid
    stored: Tensor | None

    @property
    def scales(self) -> str:
        """The name of the parameter of the scales."""
        return self.path + "scale"

    @torch.no_grad()
    def update(self) -> None:
        """Set the scales to the current medians of the latents, and convert the latents to the new units.

        A scale stays if all latents of its group are zero, or if it was not positive at first.
        """
        latents, scales = (self.relaxed.get_parameter(self.path + leaf) for leaf in ("codes", "scale"))
        middle = (self.form.levels - 1) / 2
        away = latents - middle
        before = scales.reshape(self.form.scale.shape)
        wanted = before * self._medians(away.abs()) / middle
        after = straight_cast(wanted, torch.float16, SMALLEST_SCALE)
        moves = (before > 0) & (wanted > 0) & (after != before)
        ratio = self._repeat(torch.where(moves, before / after, 1.0))
        latents.copy_(torch.where(ratio == 1, latents, middle + away * ratio))
        scales.copy_(torch.where(moves, after, before).flatten())

    def _medians(self, sizes: Tensor) -> Tensor:
        """Return the median of each group, shaped as the scales; NaN for a group without elements."""
        (out, width), (rows, groups) = self.form.codes.shape, self.form.scale.shape
        matrix = sizes.new_full((out, groups * self.form.group_size), float("nan"))
        if self.stored is None:
            matrix[:, :width] = sizes.reshape(out, width)
        else:
            matrix[:, :width].masked_scatter_(self.stored.expand(out, width).to(sizes.device), sizes)
        members = matrix.reshape(out, groups, -1)
        if rows == 1:
            members = members.transpose(0, 1).reshape(1, groups, -1)
        return members.nanmedian(-1).values

    def _repeat(self, parameters: Tensor) -> Tensor:
        """Repeat the number of each group for each of its latents, flat."""
        matrix = repeat_groups(parameters, self.form.group_size, self.form.codes.shape[1]).expand(self.form.codes.shape)
        return matrix.reshape(-1) if self.stored is None else matrix[self.stored.expand(matrix.shape).to(matrix.device)]


def median_scales(w: Weight, relaxed: RelaxedWeight) -> tuple[MedianScale, ...]:
    """Return the scales of all symmetric grids of `w` with two or three levels whose codes `relaxed` trains.

    Factors are left out, since their latents start at their codes.
    """
    scales = []
    for leaf in leaves(w, "", None, None, False):
        match leaf.node:
            case Grid(codes, scale, None, levels, group_size) as grid if levels <= MOST_LEVELS and not leaf.factor:
                if leaf.path + "codes" in relaxed.levels:
                    empty = torch.empty_like(codes, device="meta"), torch.empty_like(scale, device="meta")
                    form = Grid(*empty, None, levels, min(group_size, grid.codes.shape[1]))
                    scales.append(MedianScale(relaxed, leaf.path, form, leaf.shown))
    return tuple(scales)


def grid_headers(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the headers of all grids, except those in low-rank terms, in the header of an encoded weight."""
    if header["node"] == "grid":
        yield header
    inside = [header[key] for key in ("inside", "outside", "inner") if key in header]
    for part in [*inside, *header.get("parts", ())]:
        yield from grid_headers(part)


def can_follow(header: dict[str, Any]) -> bool:
    """True if the scales of an encoded grid can follow their latents."""
    return not header["asymmetric"] and int(header["levels"]) <= MOST_LEVELS
