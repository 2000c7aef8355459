"""Low-rank compensation against full decompositions, and alternation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, base_and_term, methods, relative_error, step
from llmcompress.methods.solvers.hessian import add_damping, second_moment
from llmcompress.methods.solvers.low_rank import factors, leading_directions
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Dense, Grid, LowRank, Where
from tests.builders import compressed, correlated, gaussian, moments, seeded

SIZES = ((12, 20), (20, 12), (16, 16), (1, 9), (9, 1))
RTN = {"method": "rtn", "bits": 2}


def problem(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(what a base lost `[out, in]`, H `[in, in]`), float64."""
    weight, inputs = gaussian(*size), correlated(400, size[1])
    lost = (weight - dense(compressed(weight, inputs, RTN).approx)).double()
    return lost, add_damping(second_moment(moments(inputs)), 0.01)


def loss(lost: Tensor, hessian: Tensor) -> float:
    return float(((lost @ hessian) * lost).sum())


def roots(hessian: Tensor) -> dict[str, Tensor]:
    """Square roots S of H = S S^T: EoRA's eigenspace, QERA's symmetric root, Cholesky."""
    values, vectors = torch.linalg.eigh(hessian)
    return {
        "eigenspace": vectors * values.sqrt(),
        "symmetric": (vectors * values.sqrt()) @ vectors.T,
        "cholesky": torch.linalg.cholesky(hessian),
    }


@pytest.mark.parametrize("size", SIZES)
def test_the_projection_is_the_best_product_whatever_the_root(size: tuple[int, int]) -> None:
    """B A = SVD_r(E S) inverse(S) is one matrix for all S (arXiv 2410.21271, 2410.06040): here without an inverse."""
    lost, hessian = problem(size)
    for rank in range(1, min(size) + 1):
        directions = leading_directions(lost, hessian, rank)
        torch.testing.assert_close(directions.T @ directions, torch.eye(rank, dtype=torch.float64))
        mine = directions @ (directions.T @ lost)
        for name, root in roots(hessian).items():
            u, s, v = torch.linalg.svd(lost @ root, full_matrices=False)
            theirs = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9, msg=f"rank {rank}: not the {name} form")


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_is_the_tail_of_the_singular_values_and_falls_with_the_rank(size: tuple[int, int]) -> None:
    lost, hessian = problem(size)
    tail = torch.linalg.svdvals(lost @ roots(hessian)["cholesky"]).square()
    losses = [loss(lost, hessian)]
    for rank in range(1, min(size) + 1):
        directions = leading_directions(lost, hessian, rank)
        losses.append(loss(lost - directions @ (directions.T @ lost), hessian))
        assert losses[-1] == pytest.approx(float(tail[rank:].sum()), rel=1e-9, abs=1e-12 * losses[0])
    assert losses == sorted(losses, reverse=True) and losses[-1] <= 1e-12 * losses[0]


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_a_moment_without_full_rank_is_no_obstacle(size: tuple[int, int]) -> None:
    lost = gaussian(*size).double()
    inputs = correlated(5, size[1]).double()
    hessian = inputs.T @ inputs
    directions = leading_directions(lost, hessian, 5)
    assert loss(lost - directions @ (directions.T @ lost), hessian) <= 1e-10 * loss(lost, hessian)


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_each_method_wins_in_its_own_norm(rank: int, factor_bits: int) -> None:
    """SVD in weight loss, EoRA in output loss, after rounding of the factors; 1 % for that rounding."""
    weight, inputs = gaussian(32, 48), correlated(800, 48)
    form = {"rank": rank, "factor_bits": factor_bits}
    done = {name: compressed(weight, inputs, RTN, {"method": name, **form}).approx for name in ("svd", "lqer", "eora")}
    in_weights = {name: relative_error(weight, w) for name, w in done.items()}
    in_outputs = {name: relative_error(weight, w, moments(inputs)) for name, w in done.items()}
    base = compressed(weight, inputs, RTN).approx
    assert in_weights["svd"] <= 1.01 * min(in_weights.values())
    assert in_outputs["eora"] <= 1.01 * min(in_outputs.values())
    assert in_outputs["eora"] < relative_error(weight, base, moments(inputs))
    assert len({bits(w) for w in done.values()}) == 1, "equal bits"


@pytest.mark.parametrize("method", ["svd", "lqer", "eora"])
def test_stored_factors_lose_little_against_the_exact_ones(method: str) -> None:
    weight, inputs = gaussian(32, 48), correlated(800, 48)
    lost = (weight - dense(compressed(weight, inputs, RTN).approx)).double()
    hessian = second_moment(moments(inputs))
    metric = {
        "svd": torch.eye(48, dtype=torch.float64),
        "lqer": torch.diag(hessian.diagonal()),
        "eora": add_damping(hessian, 0.01),
    }[method]
    directions = leading_directions(lost, metric, 6)
    exact = loss(lost - directions @ (directions.T @ lost), metric)
    for factor_bits, allowed in ((16, 1.001), (8, 1.01), (4, 1.3)):
        step = {"method": method, "rank": 6, "factor_bits": factor_bits}
        stored = weight.double() - dense(compressed(weight, inputs, RTN, step).approx).double()
        assert exact * (1 - 1e-9) <= loss(stored, metric) <= allowed * exact, f"{factor_bits} bits"


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_a_diagonal_metric_gives_what_its_matrix_gives(size: tuple[int, int], factor_bits: int) -> None:
    weight, diagonal = gaussian(*size).double(), torch.rand(size[1], dtype=torch.float64) + 0.1
    terms = []
    for metric in (diagonal, torch.diag(diagonal)):
        directions = leading_directions(weight, metric, 5)
        terms.append(dense(factors(weight, directions, metric, factor_bits)))
    torch.testing.assert_close(*terms)


@pytest.mark.parametrize("method", ["svd", "eora"])
def test_full_rank_gives_everything_back(method: str) -> None:
    weight, inputs = gaussian(16, 24), correlated(400, 24)
    done = compressed(weight, inputs, RTN, {"method": method, "rank": 16, "factor_bits": 16}).approx
    assert relative_error(weight, done, moments(inputs)) < 1e-4
    before = relative_error(weight, compressed(weight, inputs, RTN).approx, moments(inputs))
    ranks = [
        relative_error(weight, compressed(weight, inputs, RTN, {"method": method, "rank": r, "factor_bits": 16}).approx)
        for r in (1, 2, 4, 8, 16)
    ]
    assert before > 0.01 and (method == "eora" or ranks == sorted(ranks, reverse=True))


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_share_of_the_bits_is_kept_to(share: float, factor_bits: int) -> None:
    weight, inputs = gaussian(64, 96), correlated(300, 96)
    base, term = base_and_term(
        compressed(weight, inputs, RTN, {"method": "svd", "share": share, "factor_bits": factor_bits}).approx
    )
    assert term is not None
    rank = term.left.codes.shape[1] if isinstance(term.left, Grid) else dense(term.left).shape[1]
    factors = rank * (64 + 96) * factor_bits
    assert rank == 1 or factors <= share * bits(base), "more than the share"
    assert factors + (64 + 96) * factor_bits > share * bits(base), "another rank would fit"


def test_factors_of_nothing_are_zero() -> None:
    done = compressed(torch.zeros(6, 8), correlated(100, 8), {"method": "eora", "rank": 2}).approx
    term = base_and_term(done)[1]
    assert isinstance(term, LowRank) and int(dense(term).count_nonzero()) == 0


ALTERNATIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "gptq", "bits": "ternary"}, {"method": "eora", "rank": 2}),
    ({"method": "rtn", "bits": 2}, {"method": "svd", "rank": 4}),
    ({"method": "sparsegpt", "pattern": "2:4"}, {"method": "eora", "rank": 4, "factor_bits": 16}),
    ({"method": "pb_llm", "salient": 0.1}, {"method": "lqer", "rank": 2}),
    ({"method": "trellis", "memory": 8, "bits": 2}, {"method": "eora", "rank": 8, "factor_bits": 16}),
    ({"method": "vq"}, {"method": "svd", "rank": 8, "factor_bits": 16}),
]


@pytest.mark.parametrize("base, low_rank", ALTERNATIONS, ids=lambda s: str(s["method"]))
def test_more_rounds_are_never_worse_on_the_calibration_inputs(base: dict[str, Any], low_rank: dict[str, Any]) -> None:
    """The best round is kept: the rounds themselves go up and down (LoftQ and CALDERA promise no more)."""
    weight, inputs = gaussian(24, 32, seed=1), correlated(600, 32, seed=1)
    both = {"method": "alternate", "base": base, "low_rank": low_rank}
    errors = [
        relative_error(weight, compressed(weight, inputs, {**both, "rounds": rounds}).approx, moments(inputs))
        for rounds in range(1, 9)
    ]
    once = relative_error(weight, compressed(weight, inputs, base, low_rank).approx, moments(inputs))
    assert errors[0] == pytest.approx(once, rel=1e-9), "one round is the two steps"
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0], errors


def test_alternation_goes_on_after_pruning() -> None:
    """Each round's base is made of the pruned weight less the term, not of the base before."""
    weight, inputs = gaussian(24, 32, seed=1), correlated(600, 32, seed=1)
    prune = {"method": "wanda", "sparsity": 0.5}
    both = {"method": "alternate", "base": RTN, "low_rank": {"method": "eora", "rank": 8, "factor_bits": 16}}
    errors = [
        relative_error(weight, compressed(weight, inputs, prune, {**both, "rounds": rounds}).approx, moments(inputs))
        for rounds in (1, 8)
    ]
    assert errors[1] < 0.99 * errors[0]


def test_a_base_after_pruning_and_a_term_is_rounded_to_what_both_leave() -> None:
    weight, inputs = gaussian(24, 32), correlated(600, 32)
    term = {"method": "svd", "rank": 8, "factor_bits": 16}
    done = compressed(weight, inputs, {"method": "magnitude", "sparsity": 0.5}, term, {"method": "rtn", "bits": 8})
    base, low_rank = base_and_term(done.approx)
    assert low_rank is not None and isinstance(base, Where)
    wanted = (weight - dense(low_rank)) * base.index.inside
    torch.testing.assert_close(dense(base), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_components_beyond_the_rank_of_what_was_lost_are_nothing() -> None:
    weight, inputs = gaussian(48, 64), correlated(600, 64)
    weight[4:] = 0
    errors = [
        relative_error(
            weight,
            compressed(weight, inputs, RTN, {"method": "eora", "rank": rank, "factor_bits": 8}).approx,
            moments(inputs),
        )
        for rank in (4, 8)
    ]
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize(
    "wanted", [{"method": "vq"}, {"method": "kmeans"}, {"method": "binary_low_rank", "rank": 8}], ids=str
)
def test_the_seed_of_a_recipe_is_that_of_its_draws(wanted: dict[str, Any]) -> None:
    weight, inputs = gaussian(48, 64), correlated(600, 64)
    one, two, again = (
        dense(methods()[wanted["method"]].run(layer, step(wanted)).approx)
        for layer in (Layer("q", weight, Dense(weight), moments(inputs), seed) for seed in ("0/q", "1/q", "1/q"))
    )
    assert not torch.equal(one, two) and torch.equal(two, again)


def test_a_base_after_a_low_rank_term_approximates_what_the_term_leaves() -> None:
    weight, inputs = gaussian(24, 32), correlated(600, 32)
    done = compressed(weight, inputs, {"method": "svd", "rank": 3, "factor_bits": 16}, RTN)
    base, term = base_and_term(done.approx)
    assert isinstance(base, Grid) and term is not None
    alone = compressed(weight - dense(term), inputs, RTN).approx
    assert torch.equal(dense(base), dense(alone))


def test_a_dense_matrix_of_low_rank_is_found() -> None:
    left, right = torch.randn(12, 2, generator=seeded(0)), torch.randn(2, 20, generator=seeded(1))
    lost = (left @ right).double()
    directions = leading_directions(lost, torch.eye(20, dtype=torch.float64), 2)
    torch.testing.assert_close(directions @ directions.T @ lost, lost)


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_two_factors_alone_lose_the_tail_of_the_singular_values(size: tuple[int, int], rank: int) -> None:
    """`low_rank` against a decomposition through Cholesky's root, which it does not take."""
    weight, inputs = gaussian(*size), correlated(400, size[1])
    hessian = add_damping(second_moment(moments(inputs)), 0.01)
    tail = float(torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(hessian)).square()[rank:].sum())
    stored = compressed(weight, inputs, {"method": "low_rank", "rank": rank}).approx
    assert isinstance(stored, LowRank) and bits(stored) == 16 * rank * sum(size)
    found = loss(weight.double() - dense(stored).double(), hessian)
    assert tail * (1 - 1e-6) <= found <= 1.001 * tail + 1e-4 * loss(weight.double(), hessian)


def test_a_share_of_the_dense_bits_is_kept_to() -> None:
    stored = compressed(gaussian(64, 96), correlated(300, 96), {"method": "low_rank", "share": 0.3}).approx
    assert 0.3 - 160 / (64 * 96) < bits(stored) / (16 * 64 * 96) <= 0.3


def test_two_factors_come_first() -> None:
    with pytest.raises(RecipeError, match="two factors stand for the whole matrix, so nothing but a rotation comes"):
        compressed(gaussian(16, 24), correlated(300, 24), RTN, {"method": "low_rank", "rank": 2})
