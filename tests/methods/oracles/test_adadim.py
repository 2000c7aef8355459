"""Groups along the output (AdaDim, arXiv 2309.15531): slow float64 oracles, and the laws of the choice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.grids.adadim import DownColumns
from llmcompress.methods.layer import Layer, relative_error, sketch, step
from llmcompress.methods.refine import descend
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.grid import GridFormat
from llmcompress.methods.solvers.hessian import inverse_factor
from llmcompress.methods.solvers.projection import GridPoints
from llmcompress.weight.expression import bits, dense, describe
from llmcompress.weight.nodes import Grid, Transpose
from llmcompress.weight.rows import check_rows
from tests.builders import compressed, correlated, gaussian, moments, seeded
from tests.methods.oracles.slow import fit, nearest, optimal_brain_surgeon
from tests.methods.oracles.test_feedback import DAMPING, assert_same_but_for_ties, problem

FORMS = [
    GridFormat(levels, size, symmetric) for levels in (3, 8) for size in (8, 5, None) for symmetric in (True, False)
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
STEP: dict[str, Any] = {"method": "adadim", "bits": 3, "group_size": 16}


def down(weight: Tensor, form: GridFormat, factor: Tensor | None = None) -> Transpose:
    """`weight [out, in]` on grids along the output."""
    found = feedback(weight, factor, DownColumns(form, len(weight)))
    assert isinstance(found, Transpose) and isinstance(found.inner, Grid)
    return found


@every_form
def test_without_feedback_it_is_the_transpose_of_the_other_axis(form: GridFormat) -> None:
    weight = gaussian(18, 20)
    lying, plain = down(weight, form).inner, feedback(weight.T.contiguous(), None, GridPoints(form, 18))
    assert isinstance(lying, Grid) and isinstance(plain, Grid)
    assert torch.equal(lying.codes, plain.codes) and torch.equal(lying.scale, plain.scale)
    assert (lying.zero is None and plain.zero is None) or torch.equal(lying.zero, plain.zero)  # type: ignore[arg-type]
    assert torch.equal(dense(down(weight, form)), dense(plain).T)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, 5])
def test_with_feedback_it_is_obs_with_a_fit_of_every_column(group_size: int, symmetric: bool) -> None:
    weight, inputs, hessian, _ = problem(5)
    factor, _ = inverse_factor(moments(inputs), DAMPING)
    mine = dense(down(weight, GridFormat(8, group_size, symmetric), factor))

    def store(column: int, wanted: Tensor) -> Tensor:
        stored = []
        for part in wanted.split(group_size):
            scale, zero = fit(part[None], 8, symmetric, True, torch.ones(len(part), dtype=torch.float64))
            each = len(part)
            stored.append(nearest(part, scale.expand(each), None if zero is None else zero.expand(each), 8))
        return torch.cat(stored)

    slow = optimal_brain_surgeon(weight, hessian, lambda column, current, pivots: None, store)
    assert_same_but_for_ties(mine, slow, hessian, weight)


@every_form
def test_a_loud_column_changes_its_own_scales_alone(form: GridFormat) -> None:
    weight = gaussian(18, 20)
    loud = weight.clone()
    loud[:, 3] *= 64
    one, other = down(weight, form).inner, down(loud, form).inner
    assert isinstance(one, Grid) and isinstance(other, Grid)
    assert torch.equal(one.codes, other.codes), "codes along the output do not see how large a column is"
    factors = torch.ones(20, 1)
    factors[3] = 64
    torch.testing.assert_close(other.scale.float(), one.scale.float() * factors, rtol=2e-3, atol=1e-6)


def chosen(weight: Tensor, inputs: Tensor, **arguments: Any) -> Layer:
    return compressed(weight, inputs, STEP | arguments)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_better_axis_stays(spread: float) -> None:
    inputs = correlated(1024, 64)
    weight = gaussian(48, 64) * (spread * torch.randn(64, generator=seeded(1))).exp()
    factor, _ = inverse_factor(moments(inputs), 0.1)
    along_input = compressed(weight, inputs, {"method": "gptq", "bits": 3, "group_size": 16}).approx
    both = along_input, down(weight, GridFormat(8, 16), factor)
    errors = [relative_error(weight, each, moments(inputs)) for each in both]
    done = chosen(weight, inputs)
    assert torch.equal(dense(done.approx), dense(both[errors[1] < errors[0]]))
    assert relative_error(weight, done.approx, moments(inputs)) == min(errors)
    assert done.notes == (), "a choice is no fallback"


def test_columns_of_unlike_size_have_groups_along_the_output_and_the_report_says_so() -> None:
    inputs, weight = torch.randn(1024, 64, generator=seeded(0)), gaussian(48, 64)
    weight[:, ::5] *= 30
    done = chosen(weight, inputs)
    assert describe(done.expression()) == "transposed (3-bit g16)"
    assert bits(done.approx) == bits(compressed(weight, inputs, {"method": "rtn", "bits": 3, "group_size": 16}).approx)
    assert describe(chosen(gaussian(48, 64), correlated(1024, 64)).expression()) == "3-bit g16"


@pytest.mark.parametrize("size", [(7, 33), (5, 300), (40, 64)])
def test_a_choice_does_not_change_the_bits(size: tuple[int, int]) -> None:
    """Groups along the output are never chosen where they would take other bits."""
    weight = gaussian(*size)
    weight[:, ::5] *= 30
    assert isinstance(chosen(weight, torch.randn(512, size[1], generator=seeded(0))).approx, Grid)


@every_form
def test_a_visit_is_the_best_move_of_every_weight_in_turn(form: GridFormat) -> None:
    weight, inputs, hessian, _ = problem(5)
    w = down(weight, form)
    moved = descend(w, weight, hessian.float())
    errors = [weight.double() - dense(each).double() for each in (w, moved)]
    before, after = (float(((error @ hessian) * error).sum()) for error in errors)
    assert after < before
    assert isinstance(moved, Transpose) and isinstance(moved.inner, Grid) and isinstance(w.inner, Grid)
    assert torch.equal(moved.inner.scale, w.inner.scale) and bits(moved) == bits(w)
    lying = moved.inner
    values, middle = dense(w).double(), torch.full(lying.scale.shape, (form.levels - 1) / 2)
    for row, column in itertools.product(range(len(weight)), range(weight.shape[1])):
        place = column, row // lying.group_size
        centre = middle[place] if lying.zero is None else lying.zero[place].double()
        points = (torch.arange(form.levels) - centre) * lying.scale[place].double()
        trials = values[row].repeat(form.levels, 1)
        trials[:, column] = points
        lost = weight[row].double() - trials
        values[row, column] = points[((lost @ hessian) * lost).sum(1).argmin()]
    torch.testing.assert_close(dense(moved).double(), values, rtol=1e-5, atol=1e-6)


def test_a_token_table_is_refused_by_the_plan() -> None:
    planned = sketch("embedding", (48, 64), [step(STEP)])
    with pytest.raises(RecipeError, match="groups along the input"):
        check_rows(planned)
    assert isinstance(sketch("o", (40, 64), [step(STEP)]), Grid), "no choice, so a plain grid"
