"""Factors of input columns (ARB-RC, arXiv 2410.03129): slow float64 oracles, and the laws they obey."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import relative_error
from llmcompress.methods.refine import descend
from llmcompress.methods.solvers.bitplanes import PlaneFormat, Planes
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.hessian import inverse_factor
from llmcompress.methods.solvers.scales import ColumnScales, flip_columns, rank_one, refit_columns, refit_scales
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Columns, Dense, Grid, LowRank, ScaledInputs, Sum, Weight, Where
from tests.builders import compressed, correlated, gaussian, grid, moments, seeded
from tests.methods.oracles.slow import damped_moment, optimal_brain_surgeon
from tests.methods.oracles.test_feedback import DAMPING, WIDTH, assert_same_but_for_ties, problem

Step = dict[str, Any]
METHODS: list[Step] = [
    {"method": "planes", "bits": 1, "columns": True},
    {"method": "planes", "bits": 2, "columns": True},
    {"method": "planes", "bits": 2, "columns": True, "group_size": 16, "feedback": False},
    {"method": "billm", "columns": True, "bitmap": "all", "group_size": 16, "rounds": 15},
]
every_method = pytest.mark.parametrize("arguments", METHODS, ids=lambda a: ",".join(map(str, a.values())))


def loss(w: Weight | Tensor, target: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T), float64."""
    error = target.double() - (w if isinstance(w, Tensor) else dense(w)).double()
    return float(((error @ hessian) * error).sum())


def made(arguments: Step, out: int = 24, width: int = 48) -> tuple[ScaledInputs, Tensor, Tensor]:
    """Return what a method stores, its target, and H."""
    weight, inputs = gaussian(out, width), correlated(16 * width, width)
    w = compressed(weight, inputs, arguments).approx
    assert isinstance(w, ScaledInputs)
    return w, weight, damped_moment(inputs, 0.1)


# --- the rank-one start ----------------------------------------------------------------------------------------------


def slow_rank_one(magnitudes: Tensor, energy: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """alpha_r and alpha_c one after the other, entry by entry: magnitudes `[out, in]`, as the paper writes them."""
    out, width = magnitudes.shape
    rows, columns = [0.0] * out, [1.0] * width
    for _ in range(rounds):
        for i in range(out):
            gain = sum(float(energy[j]) * columns[j] * float(magnitudes[i, j]) for j in range(width))
            rows[i] = gain / sum(float(energy[j]) * columns[j] ** 2 for j in range(width))
        for j in range(width):
            gain = sum(rows[i] * float(magnitudes[i, j]) for i in range(out))
            columns[j] = gain / sum(r**2 for r in rows)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64)


def test_rows_and_columns_take_turns() -> None:
    magnitudes, energy = gaussian(5, 7).abs(), torch.rand(7, generator=seeded(0)) + 0.1
    before = float("inf")
    for rounds in (1, 2, 4):
        rows, columns = slow_rank_one(magnitudes, energy, rounds)
        found = rank_one(magnitudes.T, energy, rounds)
        assert float(found.mean()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(found.double(), columns / columns.mean(), rtol=1e-4, atol=1e-6)
        lost = float(((magnitudes - torch.outer(rows, columns)).square() * energy).sum())
        assert lost <= before * (1 + 1e-9), "a turn must not lose"
        before = lost
    values, vectors = torch.linalg.svd(magnitudes.double() * energy.double().sqrt())[1:]
    exact = vectors[0].abs() / energy.double().sqrt()  # of the best rank-one matrix
    torch.testing.assert_close(rank_one(magnitudes.T, energy, 50).double(), exact / exact.mean(), rtol=1e-4, atol=0)
    assert before == pytest.approx(float(values[1:].square().sum()), rel=1e-2)


def test_a_column_of_zeros_is_no_division_by_zero() -> None:
    magnitudes = gaussian(6, 5).abs()
    magnitudes[:, 2] = 0
    found = rank_one(magnitudes.T, torch.ones(5), 5)
    assert float(found[2]) == 1 and bool((found > 0).all())
    assert torch.equal(rank_one(torch.zeros(5, 6), torch.ones(5), 5), torch.ones(5))


# --- in the feedback loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [24, 8])
def test_one_plane_is_obs_with_a_factor_fitted_to_every_column(group_size: int) -> None:
    weight, inputs, hessian, energy = problem(5)
    form = PlaneFormat(1, "residual", group_size, 3)
    factor, _ = inverse_factor(moments(inputs), DAMPING)
    projection = ColumnScales(
        lambda energy, _: Planes(form, WIDTH, energy), energy.float(), factor.diagonal().square(), 3
    )
    mine = dense(feedback(weight, factor, projection))
    rows: dict[str, Tensor] = {}

    def begin(column: int, current: Tensor, pivots: Tensor) -> None:
        if column % group_size == 0:
            part = slice(column, column + group_size)
            _, columns = slow_rank_one(current[:, part].abs(), energy[part], 3)
            columns = columns / columns.mean()
            bare, weights = current[:, part].abs() / columns, energy[part] * columns.square()
            rows["scale"] = (2 * (bare * weights).sum(1) / weights.sum()).float().half().double() / 2

    def store(column: int, wanted: Tensor) -> Tensor:
        signs = torch.where(wanted > 0, 1.0, -1.0)
        found = (wanted * signs * rows["scale"]).sum() / rows["scale"].square().sum()
        return signs * rows["scale"] * found.float().half().double()

    assert_same_but_for_ties(mine, optimal_brain_surgeon(weight, hessian, begin, store), hessian, weight)


def test_turns_of_a_factor_and_its_points_do_not_lose() -> None:
    weight = gaussian(40, 12) * torch.arange(1, 13)
    form = PlaneFormat(2, "split", None, 5)
    energy = torch.ones(12)
    started = ColumnScales(lambda energy, _: Planes(form, 12, energy), energy, energy, 5)
    started.begin(0, weight.T)
    for column, values in enumerate(weight.T):
        factor = started.columns[column].float()
        before = (values - started.inner.project(column, values / factor) * factor).square().sum()
        after = (values - started.project(column, values)).square().sum()
        assert after <= before * (1 + 1e-3), "float16 alone may come between them"
    assert len(started.columns.unique()) == 12


@pytest.mark.parametrize("fed_back", [True, False])
@pytest.mark.parametrize("name", ["planes", "billm"])
def test_magnitudes_of_rank_one_are_exact(name: str, fed_back: bool) -> None:
    random = seeded(3)
    rows, columns = (torch.rand(count, generator=random) + 0.2 for count in (24, 48))
    signs = torch.where(torch.rand(24, 48, generator=random) < 0.5, 1.0, -1.0)
    weight = signs * torch.outer(rows, columns)
    arguments = {"method": name, "columns": True, "feedback": fed_back} | ({"bits": 1} if name == "planes" else {})
    w = compressed(weight, correlated(768, 48), arguments).approx
    assert isinstance(w, ScaledInputs)
    assert relative_error(weight, w) < 1e-6, "float16 alone may come between them"
    if name == "planes":  # of two levels a row, either may go with a factor
        found = w.columns.float() / w.columns.float().mean()
        torch.testing.assert_close(found, columns / columns.mean(), rtol=5e-3, atol=0)


@every_method
def test_signs_of_columns_and_of_their_inputs_do_not_matter(arguments: Step) -> None:
    weight, inputs = gaussian(24, 48), correlated(768, 48)
    flips = torch.where(torch.rand(48, generator=seeded(2)) < 0.5, 1.0, -1.0)
    one = compressed(weight, inputs, arguments).approx
    other = compressed(weight * flips, inputs * flips, arguments).approx
    assert isinstance(one, ScaledInputs) and isinstance(other, ScaledInputs)
    torch.testing.assert_close(other.columns, one.columns, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(dense(other) * flips, dense(one), rtol=5e-3, atol=1e-4)


@every_method
def test_a_dead_column_of_weights_is_stored_as_zero(arguments: Step) -> None:
    weight = gaussian(24, 48)
    weight[:, [0, 17]] = 0
    w = compressed(weight, torch.eye(48) * 3, arguments).approx
    assert isinstance(w, ScaledInputs) and int(dense(w)[:, [0, 17]].count_nonzero()) == 0
    assert bool((w.columns >= 0).all()) and bool(dense(descend(w, weight, torch.eye(48))).isfinite().all())


# --- least squares under H -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", METHODS[:2], ids=str)
def test_factors_are_least_squares_under_h(arguments: Step) -> None:
    """One long regression: every stored column, spread over all outputs, is a regressor of the outputs."""
    w, weight, hessian = made(arguments | {"rounds": 0}, 6, 20)
    root = torch.linalg.cholesky(hessian).T  # H = root^T root
    values = dense(w.inner).double()
    basis = torch.cat([root * row for row in values])  # [6 * 20, 20]: outputs of each row for a factor of each column
    wanted = torch.cat([root @ row for row in weight.double()])
    best = torch.linalg.lstsq(basis, wanted).solution
    expected = float((wanted - basis @ best).square().sum())
    found = refit_columns(w, weight, hessian.float())
    assert expected * (1 - 1e-6) <= loss(found, weight, hessian) <= 1.002 * expected
    torch.testing.assert_close(found.columns.double(), best.abs(), rtol=5e-3, atol=1e-3)
    assert torch.equal(dense(found.inner), torch.where(best < 0, -1.0, 1.0).float() * dense(w.inner))


@every_method
def test_no_turn_of_rows_and_columns_loses(arguments: Step) -> None:
    w, weight, hessian = made(arguments | {"rounds": 0})
    before = [loss(w, weight, hessian)]
    for _ in range(6):
        fitted = refit_scales(w, weight, hessian.float())
        assert isinstance(fitted, ScaledInputs) and bool((fitted.columns >= 0).all())
        before.append(loss(fitted, weight, hessian))
        w = fitted
        assert before[-1] <= before[-2] * (1 + 1e-6)
    assert before[-1] < 0.995 * before[0]


@every_method
def test_no_visit_loses_and_the_bits_stay(arguments: Step) -> None:
    w, weight, hessian = made(arguments)
    moved = descend(w, weight, hessian.float())
    assert loss(moved, weight, hessian) <= loss(w, weight, hessian) * (1 + 1e-6)
    assert bits(moved) == bits(w) and isinstance(moved, ScaledInputs) and torch.equal(moved.columns, w.columns)


@every_method
def test_refine_polishes_rows_columns_and_signs(arguments: Step) -> None:
    weight, inputs = gaussian(24, 48), correlated(768, 48)
    hessian = damped_moment(inputs, 0.1)
    plain, polished = (compressed(weight, inputs, arguments, *more) for more in ((), ({"method": "refine"},)))
    assert loss(polished.approx, weight, hessian) < 0.99 * loss(plain.approx, weight, hessian)
    assert bits(polished.approx) == bits(plain.approx) and isinstance(polished.approx, ScaledInputs)


def test_negative_factors_turn_signs_round() -> None:
    base = grid((6, 10), 2, 10, 0, symmetric=True)
    w = ScaledInputs(base, torch.ones(10).half())
    found = refit_columns(w, -dense(base), torch.eye(10))
    assert torch.equal(dense(found), -dense(base)) and bool((found.columns == 1).all())


def test_columns_of_symmetric_planes_flip_and_others_refuse() -> None:
    half = torch.arange(10) % 2 == 0
    plane = grid((6, 10), 2, 4, 0, symmetric=True)
    for w in (plane, Sum((plane, grid((6, 10), 3, 4, 1, True))), Where(Columns(half), plane, plane)):
        turned = dense(flip_columns(w, half))
        torch.testing.assert_close(turned, torch.where(half, -1.0, 1.0) * dense(w), rtol=0, atol=1e-7)
        assert bits(flip_columns(w, half)) == bits(w)
    with pytest.raises(TypeError, match="LowRank"):
        flip_columns(LowRank(Dense(torch.ones(6, 1)), Dense(torch.ones(1, 10))), half)


# --- the column-group bitmap -----------------------------------------------------------------------------------------


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The two magnitudes that occur in a row."""
    levels = values.abs().unique()
    assert len(levels) <= 2
    return levels[0], levels[-1]


@pytest.mark.parametrize("group_size", [None, 16])
def test_all_columns_are_split_by_magnitude_each_kind_by_itself(group_size: int | None) -> None:
    """Four groups a row; where none is fed back, the two of salient columns lose least of all splits in two."""
    weight = gaussian(24, 64)
    weight[:, [3, 20, 40, 55]] *= 5
    inputs = torch.randn(1024, 64, generator=seeded(0))
    energy = inputs.square().mean(0).double()
    arguments: Step = {"method": "billm", "group_size": group_size, "feedback": False}
    found = [compressed(weight, inputs, arguments | {"bitmap": each}).approx for each in ("all", "others")]
    every, others = ((weight.double() - dense(w).double()).square() @ energy for w in found)
    assert float(every.sum()) <= float(others.sum()) * (1 + 1e-6) and bits(found[0]) == bits(found[1])
    w = found[0]
    assert isinstance(w, Where) and isinstance(w.index, Columns)
    for start in range(0, 64, group_size or 64):
        part = torch.arange(64).div(group_size or 64, rounding_mode="floor") == start // (group_size or 64)
        for side, columns in ((w.inside, part & w.index.inside), (w.outside, part & ~w.index.inside)):
            if not bool(columns.any()):
                continue
            for row, stored in zip(weight[:, columns], dense(side)[:, columns]):
                low, high = halves(stored)
                large = stored.abs() == high
                if low < high:  # bell-shaped: what is large is larger than what is small
                    assert row[large].abs().min() >= row[~large].abs().max()
                mean = (row.abs() * energy[columns])[large].sum() / energy[columns][large].sum()
                assert float(high) == pytest.approx(float(mean), rel=2e-3)


# --- what it is worth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", METHODS[:2] + METHODS[3:], ids=str)
def test_columns_pay_where_channels_are_unlike(arguments: Step) -> None:
    """The trap: fitted to magnitudes alone, factors of columns would make outputs worse than none."""
    weight = gaussian(48, 64) * (0.8 * torch.randn(64, generator=seeded(5))).exp()
    calibration, unseen = (correlated(1024, 64, seed=part) for part in (1, 2))
    errors = [
        relative_error(weight, compressed(weight, calibration, arguments | {"columns": on}).approx, moments(unseen))
        for on in (True, False)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_counted_bits_of_row_and_column_scales() -> None:
    w, _, _ = made(METHODS[0], 24, 48)
    assert bits(w) == 24 * 48 + 24 * 16 + 48 * 16
    assert isinstance(w.inner, Grid) and bits(replace(w, inner=w.inner)) == bits(w)
    four_groups, _, _ = made(METHODS[3], 24, 48)
    assert bits(four_groups) == 2 * 24 * 48 + 4 * 24 * 3 * 16 + 48 + 48 * 16, "two scales of each kind, a row and group"
