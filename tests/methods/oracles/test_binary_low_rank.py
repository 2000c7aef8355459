"""Binary factors against a transcription that solves every element's equations, and what they must beat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.binary.binary_low_rank import PULL, BinaryFactors, balance, fit_factors, fit_scales, signs
from llmcompress.methods.layer import Layer, apply, relative_error, sketch, step
from llmcompress.methods.moments import Moments
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Dense, Grid, LowRank, ScaledInputs, shape
from tests.builders import compressed, correlated, gaussian, moments, seeded

SIZE = (40, 56)


def blr(**arguments: float) -> dict[str, object]:
    return {"method": "binary_low_rank", **arguments}


def product(found: BinaryFactors) -> Tensor:
    return (found.rows[:, None] * found.left * found.middle) @ (found.right * found.columns)


def loss(target: Tensor, metric: Tensor, found: BinaryFactors) -> float:
    lost = (target - product(found)).double()
    return float(((lost @ metric.double()) * lost).sum())


# --- the size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0.3, 0.55, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("size", [(576, 576), (192, 576), (576, 1536)])
def test_the_rank_is_the_largest_whose_bits_are_at_most_those_asked_for(asked: float, size: tuple[int, int]) -> None:
    planned = sketch("a", size, [step(blr(bits=asked))])
    assert isinstance(planned, LowRank)
    (out, width), rank = size, shape(planned.left)[1]
    counted = rank * (out + width) + 16 * (out + rank + width)
    assert bits(planned) == counted <= asked * out * width < counted + out + width + 16


def test_a_matrix_whose_scales_take_all_bits_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(RecipeError, match=r"leave no rank to a matrix \[16, 24\].* raise bits above 1\.81"):
        sketch("a", (16, 24), [step(blr(bits=1))])
    assert bits(sketch("a", (16, 24), [step(blr(bits=1.82))])) == 16 * 40 + 56


@pytest.mark.parametrize("arguments", [{}, {"rank": 4, "bits": 0.8}])
def test_either_a_rank_or_bits(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give either rank or bits"):
        step(blr(**arguments))


def test_two_binary_grids_and_three_vectors_of_scales_are_stored() -> None:
    found = compressed(gaussian(*SIZE), correlated(300, SIZE[1]), blr(rank=9, iterations=4)).approx
    assert isinstance(found, LowRank) and isinstance(found.right, ScaledInputs)
    left, right = found.left, found.right.inner
    assert isinstance(left, Grid) and isinstance(right, Grid) and left.levels == right.levels == 2
    assert bits(found) == 9 * sum(SIZE) + 16 * (9 + sum(SIZE))
    values = dense(found)
    halves = left.scale.float() / 2, right.scale.float() / 2
    expected = (halves[0] * signs(left.codes.float() - 0.5)) @ (
        halves[1] * signs(right.codes.float() - 0.5) * found.right.columns.float()
    )
    torch.testing.assert_close(values, expected)


# --- the descent ----------------------------------------------------------------------------------------------------


def slow_alternation(target: Tensor, metric: Tensor, draws: Tensor, iterations: int) -> Tensor:
    """ADMM of DBF (arXiv 2505.11076) under a full metric, every half a dense linear system over all elements."""
    (out, width), rank = target.shape, len(draws)
    right = torch.where(draws < 0, -1.0, 1.0).double() / rank**0.5
    left = torch.zeros(out, rank).double()
    duals = [torch.zeros(out, rank).double(), torch.zeros(rank, width).double()]
    for done in range(iterations):
        pull = PULL[0] * (PULL[1] / PULL[0]) ** (done / max(iterations - 1, 1))
        gram = right @ metric @ right.T
        penalty = pull * torch.diag(gram.diagonal())
        wanted = target @ metric @ right.T + (left - duals[0]) @ penalty
        solved = torch.linalg.solve(gram + penalty, wanted, left=False)
        moved = solved + duals[0]
        left = torch.where(moved < 0, -1.0, 1.0) * moved.abs().mean(1, keepdim=True)
        duals[0] = moved - left

        curvature = left.T @ left
        even = pull * curvature.diagonal().mean() * metric.diagonal().mean()
        system = torch.kron(curvature, metric) + even * torch.eye(rank * width).double()
        wanted = left.T @ target @ metric + even * (right - duals[1])
        moved = torch.linalg.solve(system, wanted.flatten()).view(rank, width) + duals[1]
        sizes, columns = moved.abs(), torch.ones(width).double()
        for _ in range(2):  # power iterations for the rank-one fit to magnitudes
            middle = sizes @ columns / (columns @ columns)
            columns = middle @ sizes / (middle @ middle)
        middle = sizes @ columns / (columns @ columns)
        right = torch.where(moved < 0, -1.0, 1.0) * torch.outer(middle, columns)
        duals[1] = moved - right
    return left @ right


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_alternation_is_that_of_the_paper_element_by_element(iterations: int) -> None:
    inputs = correlated(300, 14)
    problem, _, _ = balance(gaussian(10, 14).double(), (inputs.T @ inputs / 300).double(), None)
    draws = torch.randn(5, 14, generator=seeded(3), dtype=torch.float64)
    found = fit_factors(problem, draws, iterations)
    torch.testing.assert_close(product(found), slow_alternation(problem.target, problem.metric, draws, iterations))


def test_balancing_is_undone_by_the_scales_and_keeps_the_loss() -> None:
    target, inputs, counts = gaussian(*SIZE), correlated(300, SIZE[1]), torch.rand(SIZE[0], generator=seeded(1)) + 0.1
    hessian = inputs.T @ inputs / 300
    problem, rows, columns = balance(target, hessian, counts)
    torch.testing.assert_close(problem.target * rows[:, None] * columns, target)
    torch.testing.assert_close(problem.metric.diagonal(), torch.ones(SIZE[1]))
    own = ((target @ hessian) * target).sum(1) * counts
    mine = ((problem.target @ problem.metric) * problem.target).sum(1)
    torch.testing.assert_close(mine / mine.sum(), own / own.sum())


def test_least_squares_for_the_scales_never_loses_and_leaves_nothing_to_the_rows() -> None:
    inputs = correlated(300, SIZE[1])
    problem, _, _ = balance(gaussian(*SIZE), inputs.T @ inputs / 300, None)
    found = fit_factors(problem, torch.randn(12, SIZE[1], generator=seeded(0)), 4)
    better = fit_scales(problem, found)
    before, after = (loss(problem.target, problem.metric, each) for each in (found, better))
    assert after < 0.999 * before
    values = product(better)
    slope = (((problem.target - values) @ problem.metric) * values).sum(1)
    assert float(slope.abs().max()) < 1e-4 * float(((values @ problem.metric) * values).sum(1).max())
    assert all(bool((scale >= 0).all()) for scale in (better.rows, better.middle, better.columns))


# --- what it is worth -----------------------------------------------------------------------------------------------


def test_a_product_of_binary_factors_is_found() -> None:
    left, right = signs(gaussian(96, 4)), signs(gaussian(4, 128, seed=1))
    weight = (left * (torch.rand(96, 1, generator=seeded(1)) + 0.5)) @ (
        right * torch.tensor([[3.0], [2.5], [2], [1.5]])
    )
    found = compressed(weight, correlated(600, 128), blr(rank=4)).approx
    assert relative_error(weight, found) < 1e-4


def test_more_iterations_and_more_bits_leave_less_error() -> None:
    weight, inputs = gaussian(96, 128), correlated(1024, 128)

    def error(**arguments: float) -> float:
        return relative_error(weight, compressed(weight, inputs, blr(**arguments)).approx, moments(inputs))

    by_iterations = [error(bits=1, iterations=count) for count in (5, 15, 45)]
    by_bits = [error(bits=rate, iterations=20) for rate in (0.6, 1, 1.5)]
    assert by_iterations[0] > 1.1 * by_iterations[1] > 1.1 * 1.03 * by_iterations[2]
    assert by_bits[0] > 1.1 * by_bits[1] > 1.2 * by_bits[2]


def test_statistics_pay_on_tokens_not_seen() -> None:
    errors = torch.zeros(2)
    for seed in range(2):
        weight = gaussian(48, 64, seed=10 * seed)
        fitted, unseen = (correlated(1024, 64, seed=100 * seed + part, basis=seed) for part in (1, 2))
        for place, known in enumerate((moments(fitted), Moments(0.0))):
            given = Layer("a", weight, Dense(weight.bfloat16()), known)
            found = apply(given, [step(blr(rank=16, iterations=30))]).approx
            errors[place] += relative_error(weight, found, moments(unseen))
    assert errors[0] < 0.9 * errors[1]


def test_rows_that_count_more_are_kept_better() -> None:
    weight, inputs = gaussian(48, 64), correlated(1024, 64)
    counts = torch.ones(48)
    counts[:12] = 30.0
    losses = []
    for rows in (None, counts):
        given = Layer("a", weight, Dense(weight.bfloat16()), moments(inputs), rows=rows)
        found = dense(apply(given, [step(blr(rank=16, iterations=30))]).approx)
        losses.append(
            [relative_error(weight[part], found[part], moments(inputs)) for part in (slice(12), slice(12, 48))]
        )
    (alike, alike_rest), (favoured, rest) = losses
    assert favoured < 0.6 * alike and rest > alike_rest


@pytest.mark.parametrize("size", [(128, 192), (192, 128)])
def test_one_bit_beats_a_binary_plane_and_factors_of_floats_in_fewer_bits(size: tuple[int, int]) -> None:
    weight, inputs, unseen = gaussian(*size), correlated(2048, size[1], seed=1), correlated(2048, size[1], seed=2)
    mine = compressed(weight, inputs, blr(bits=1.05, iterations=40)).approx
    plane = compressed(weight, inputs, {"method": "planes", "bits": 1}).approx
    floats = compressed(weight, inputs, {"method": "low_rank", "rank": 6}).approx
    assert bits(mine) <= min(bits(plane), bits(floats))
    own, planes, factors = (relative_error(weight, found, moments(unseen)) for found in (mine, plane, floats))
    assert own < 0.95 * min(planes, factors), (own, planes, factors)
