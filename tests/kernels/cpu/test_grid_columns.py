"""Columns rounded to grids in one call: as one after the other, on every tier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.kernels.cpu import build, grid_columns
from llmcompress.kernels.cpu.instruction_sets import Tier
from llmcompress.methods.solvers.feedback import BlockProjection, feedback
from llmcompress.methods.solvers.grid import GridFormat
from llmcompress.methods.solvers.projection import (
    GridPoints,
    KeptValues,
    PrunedValues,
    Selection,
    Zeros,
    largest,
    largest_of_each,
)
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Bitmap, Weight
from tests.builders import correlated, seeded
from tests.kernels.cpu.test_products import every_tier

FORMS = {  # (rows, columns, group, symmetric, reordered)
    "groups of a block": (96, 200, 64, False, False),
    "groups that a block holds two of": (77, 130, 32, True, False),
    "one scale a row": (50, 256, None, True, False),
    "groups longer than a block": (70, 192, 128, False, False),
    "reordered": (64, 100, 16, False, True),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


class OneByOne:
    """A projection without its way to take several columns at once."""

    def __init__(self, inner: GridPoints) -> None:
        self.strides, self.begin, self.project, self.weight = inner.strides, inner.begin, inner.project, inner.weight


def given(form: Any) -> tuple[Tensor, Tensor, GridPoints, Tensor | None]:
    rows, columns, group, symmetric, reordered = form
    weight, inputs = torch.randn(rows, columns, generator=seeded(1)), correlated(512, columns)
    hessian = inputs.T @ inputs / 512 + 0.3 * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T.contiguous()
    order = torch.randperm(columns, generator=seeded(2)) if reordered else None
    importance = torch.rand(columns, generator=seeded(3))
    return weight, factor, GridPoints(GridFormat(16, group, symmetric), columns, importance, order), order


def rounded(form: Any, fed: bool, one_by_one: bool = False) -> Weight:
    weight, factor, projection, order = given(form)
    assert isinstance(projection, BlockProjection)
    way: Any = OneByOne(projection) if one_by_one else projection
    return feedback(weight, factor if fed else None, way, order)


@every_form
@pytest.mark.parametrize("fed", [False, True])
def test_several_columns_are_rounded_as_one_after_the_other(form: Any, fed: bool) -> None:
    """But for codes that roundings of sums decide, and then as near."""
    found, expected = (dense(rounded(form, fed, one_by_one)) for one_by_one in (False, True))
    assert float((found != expected).float().mean()) < 0.01
    weight, factor, *_ = given(form)
    losses = [float(((found - weight) @ torch.linalg.inv(factor)).square().sum()) for found in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 5)])
def test_several_columns_are_pruned_as_one_after_the_other(pattern: tuple[int, int] | None) -> None:
    """But for places that roundings of sums decide, and then as well."""
    rows, columns = 90, 320
    weight, inputs = torch.randn(rows, columns, generator=seeded(1)), correlated(512, columns)
    hessian = inputs.T @ inputs / 512 + 0.3 * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T.contiguous()
    pivots = factor.diagonal().square()[:, None]

    def choose(current: Tensor, start: int) -> Tensor:
        saliency = current.square() / pivots[start : start + len(current)]
        return largest_of_each(saliency, *pattern) if pattern else largest(saliency, saliency.numel() // 2)

    def index(chosen: Tensor) -> Bitmap:
        return Bitmap(chosen)

    span = pattern[1] if pattern else 128
    ways = PrunedValues(choose, span, index), Selection(KeptValues(), Zeros(), choose, span, index)
    assert isinstance(ways[0], BlockProjection) and not isinstance(ways[1], BlockProjection)
    found, expected = (dense(feedback(weight, factor, way)) for way in ways)
    assert float((found != expected).float().mean()) < 0.02
    assert int((found != 0).sum()) == int((expected != 0).sum())
    losses = [float(((each - weight) @ torch.linalg.inv(factor)).square().sum()) for each in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@every_tier
def test_every_tier_rounds_alike(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["groups that a block holds two of"]
    expected = dense(rounded(form, True))
    monkeypatch.setattr(grid_columns, "load_kernel", lambda kernel: build.load_kernel(kernel, tier))
    assert float((dense(rounded(form, True)) != expected).float().mean()) < 0.01, "up to sums without one rounding"
