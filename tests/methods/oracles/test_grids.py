"""Grids: nearest points, the clip search, and the errors that theory gives for a Gaussian."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from llmcompress.errors import NumericsError
from llmcompress.methods.layer import relative_error
from llmcompress.methods.solvers.grid import GridFormat, fit_grid, round_to
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Grid
from tests.builders import compressed, correlated, gaussian, seeded

# Squared error of a unit Gaussian: the best grid of equal steps, and where half of it is the optimum of any kind.
GAUSSIAN = {1: 0.3634, "ternary": 0.1902, 2: 0.1188, 3: 0.0374, 4: 0.01154}


def rtn(weight: torch.Tensor, **form: Any) -> Grid:
    approx = compressed(weight, correlated(8, weight.shape[1]), {"method": "rtn", **form}).approx
    assert isinstance(approx, Grid)
    return approx


@pytest.mark.parametrize("form", [{"bits": b, "symmetric": s} for b in (2, 3, 4, 8) for s in (True, False)], ids=str)
def test_unclipped_weights_are_within_half_a_step(form: dict[str, Any]) -> None:
    weight = gaussian(8, 50)
    w = rtn(weight, clip=False, group_size=16, **form)
    steps = w.scale.float().repeat_interleave(16, 1)[:, :50]
    # float16 rounds the scale, so the ends of the range may miss half a step by a thousandth of the range; the
    # zero point of an asymmetric grid is a whole code, which costs the range up to another half step
    slack = 1e-3 * w.levels + (0.5 if w.zero is not None else 0)
    assert ((weight - dense(w)).abs() <= steps * (0.5 + slack)).all()
    inside = (w.codes > 0) & (w.codes < w.levels - 1)
    assert ((weight - dense(w)).abs() <= steps * (0.5 + 1e-5))[inside].all()


@pytest.mark.parametrize("bits", [2, 3, "ternary", 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_has_the_nearest_code(bits: int | str, symmetric: bool) -> None:
    if bits == "ternary" and not symmetric:
        return
    weight = gaussian(4, 24)
    w = rtn(weight, bits=bits, symmetric=symmetric, group_size=8)
    centre = torch.tensor((w.levels - 1) / 2) if w.zero is None else w.zero.double().repeat_interleave(8, 1)[..., None]
    scale = w.scale.double().repeat_interleave(8, 1)[..., None]
    points = (torch.arange(w.levels).double() - centre) * scale
    best = (points - weight.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((weight.double() - dense(w).double()).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4])
def test_rounding_again_changes_nothing(bits: int | str) -> None:
    weight = gaussian(6, 40)
    w = rtn(weight, bits=bits)
    values = dense(w)
    torch.testing.assert_close(round_to(values, w.scale, w.zero, w.levels), values)


@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_search_never_loses_to_the_full_range(bits: int | str, symmetric: bool) -> None:
    if bits == "ternary" and not symmetric:
        return
    for group_size in (None, 16, 7):
        weight = gaussian(8, 64, seed=3)
        clipped, full = (
            rtn(weight, bits=bits, symmetric=symmetric, group_size=group_size, clip=clip) for clip in (True, False)
        )
        assert relative_error(weight, clipped) <= relative_error(weight, full)
    importance = torch.rand(64, generator=seeded(0)) * 5
    losses = []
    for clip in (True, False):
        scale, zero = fit_grid(weight, GridFormat(8, clip=clip), importance)
        losses.append(((round_to(weight, scale, zero, 8) - weight).square() * importance).sum(1))
    assert bool((losses[0] <= losses[1]).all()), "a row got worse in the norm that was searched in"


def test_clipping_pays_most_at_two_bits() -> None:
    weight = torch.randn(16, 256, generator=seeded(1))
    gains = [
        relative_error(weight, rtn(weight, bits=bits, clip=False)) / relative_error(weight, rtn(weight, bits=bits))
        for bits in (2, 3, 4)
    ]
    assert gains[0] > 1.5 and gains[0] > gains[1] > gains[2] >= 1


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_a_gaussian_loses_what_theory_says(bits: int | str) -> None:
    """Max's tables for equal steps; within 4 %, as the clip search has a handful of shares and samples are finite."""
    weight = torch.randn(64, 2048, generator=seeded(0))
    error = relative_error(weight, rtn(weight, bits=bits))
    assert 0.98 * GAUSSIAN[bits] <= error <= 1.04 * GAUSSIAN[bits], f"{error:.4f}, theory {GAUSSIAN[bits]}"


@pytest.mark.parametrize("bits", [2, 3])
def test_smaller_groups_lose_less(bits: int) -> None:
    weight = gaussian(16, 128)
    errors = [relative_error(weight, rtn(weight, bits=bits, group_size=size)) for size in (128, 64, 32, 16, 8)]
    assert errors == sorted(errors, reverse=True)


def test_the_binary_scale_is_the_weighted_mean_of_what_is_shown() -> None:
    weight, importance = gaussian(5, 20), torch.rand(20, generator=seeded(0)) + 0.1
    shown = torch.rand(5, 20, generator=seeded(1)) < 0.6
    scale, zero = fit_grid(weight, GridFormat(2), importance, shown)
    expected = 2 * (weight.abs() * importance * shown).sum(1) / (importance * shown).sum(1)
    torch.testing.assert_close(scale[:, 0].float(), expected, rtol=1e-3, atol=0)
    assert zero is None


@pytest.mark.parametrize("levels", [2, 3, 4, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hidden_entries_do_not_count(levels: int, symmetric: bool) -> None:
    if levels < 4 and not symmetric:
        return
    weight = gaussian(5, 20)
    shown = torch.rand(5, 20, generator=seeded(1)) < 0.5
    loud = torch.where(shown, weight, 1e3)
    form = GridFormat(levels, symmetric=symmetric)
    (scale, zero), (same, same_zero) = (fit_grid(w, form, None, shown) for w in (weight, loud))
    assert torch.equal(scale, same) and (zero is None or torch.equal(zero, same_zero))


@pytest.mark.parametrize("levels", [2, 3, 4, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_or_of_nothing_is_zero(levels: int, symmetric: bool) -> None:
    form = GridFormat(levels, symmetric=symmetric or levels < 4)
    for shown in (None, torch.zeros(2, 8, dtype=torch.bool)):
        scale, zero = fit_grid(torch.zeros(2, 8), form, torch.zeros(8), shown)
        assert (
            bool(scale.isfinite().all()) and int(round_to(torch.zeros(2, 8), scale, zero, levels).count_nonzero()) == 0
        )


def test_an_asymmetric_grid_always_has_an_exact_zero_and_uses_a_one_sided_range() -> None:
    weight = gaussian(4, 32).abs()
    w = rtn(weight, bits=3, symmetric=False, clip=False)
    assert w.zero is not None and int(w.zero.max()) == 0
    assert relative_error(weight, w) < 0.5 * relative_error(weight, rtn(weight, bits=3, clip=False))


def test_a_scale_that_float16_cannot_hold_is_refused_with_the_layer_and_the_number() -> None:
    with pytest.raises(NumericsError, match=r"block\.0\.linear: rtn: .*float16"):
        rtn(gaussian(2, 8) * 1e9, bits=3)


# --- ternary scales -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, theory", [("absmean", 0.263), ("median", 0.318)])
def test_ternary_scales_from_magnitudes_lose_what_theory_says(kind: str, theory: float) -> None:
    """Of a unit Gaussian, everything beyond half the scale goes to it (BitNet b1.58, arXiv 2402.17764)."""
    weight = torch.randn(32, 4096, generator=seeded(0))
    w = rtn(weight, bits="ternary", scale=kind)
    expected = weight.abs().mean(1) if kind == "absmean" else weight.abs().median(1).values
    torch.testing.assert_close(w.scale[:, 0].float(), expected, rtol=1e-3, atol=0)
    assert relative_error(weight, w) == pytest.approx(theory, rel=0.02)


@pytest.mark.parametrize("kind", ["absmean", "median"])
def test_ternary_scales_are_of_what_is_shown(kind: Literal["absmean", "median"]) -> None:
    weight = gaussian(5, 20)
    shown = torch.rand(5, 20, generator=seeded(1)) < 0.5
    shown[4] = False
    scale, _ = fit_grid(torch.where(shown, weight, 1e3), GridFormat(3, scale=kind), None, shown)
    for row in range(4):
        kept = weight[row, shown[row]].abs()
        wanted = kept.mean() if kind == "absmean" else kept.median()
        assert float(scale[row, 0]) == pytest.approx(float(wanted), rel=1e-3)
    assert float(scale[4, 0]) == 0


def test_a_ternary_scale_needs_three_levels() -> None:
    with pytest.raises(ValueError, match="scale: absmean needs bits: ternary"):
        rtn(gaussian(2, 8), bits=2, scale="absmean")
