"""Coordinate descent against a slow float64 transcription, and what it must never do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods import refine as engine
from llmcompress.methods.layer import apply, base_and_term, relative_error, step, support
from llmcompress.methods.refine import descend
from llmcompress.methods.solvers.scales import refit_scales
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Dense, Grid, Weight, Where
from tests.builders import compressed, correlated, gaussian, layer, moments
from tests.methods.conformance.cases import ROTATE, STEPS, assert_sound, refusal, spelled
from tests.methods.oracles.slow import damped_moment
from tests.tiers import first_of_each, one_in, tiered

SIZE = (24, 48)
REFINE: dict[str, Any] = {"method": "refine", "passes": 2}
BASES = [
    arguments for arguments in STEPS if refusal(SIZE, arguments) is None and refusal(SIZE, arguments, REFINE) is None
]
is_first = first_of_each(BASES, lambda base: base["method"])
every_base = pytest.mark.parametrize("base", tiered(BASES, is_first, spelled, slow=one_in(3, BASES)))


def loss(weight: Tensor, w: Weight, hessian: Tensor) -> float:
    error = weight.double() - dense(w).double()
    return float(((error @ hessian) * error).sum())


def test_the_bases_are_all_kinds() -> None:
    expected = {"rtn", "gptq", "pb_llm", "wanda", "sparsegpt", "magnitude", "planes", "fdb", "billm", "kmeans", "vq"}
    assert expected <= {base["method"] for base in BASES}


@every_base
def test_the_damped_loss_never_rises_and_the_bits_stay(base: dict[str, Any]) -> None:
    weight, inputs = gaussian(*SIZE), correlated(16 * SIZE[1], SIZE[1])
    hessian = damped_moment(inputs, 0.1)
    before = compressed(weight, inputs, base)
    after = compressed(weight, inputs, base, REFINE)
    assert_sound(after, SIZE, base, REFINE)
    assert loss(weight, after.approx, hessian) <= loss(weight, before.approx, hessian) * (1 + 1e-5)
    assert bits(after.approx) == bits(before.approx)
    keep = support(before.approx)
    if keep is not None:
        assert int(dense(base_and_term(after.approx)[0])[~keep].count_nonzero()) == 0, "pruned weights came back"


@every_base
def test_it_pays_on_tokens_not_seen(base: dict[str, Any]) -> None:
    """As a mean of four layers, and in a rotated basis as well."""
    for first in ([], [ROTATE]):
        ratios = []
        for seed in range(4):
            weight, inputs = gaussian(*SIZE, seed), correlated(1024, SIZE[1], seed=2 * seed)
            unseen = moments(correlated(1024, SIZE[1], seed=2 * seed + 1))
            done = [compressed(weight, inputs, *first, base, *more).expression() for more in ([], [REFINE])]
            plain, refined = (relative_error(weight, w, unseen) for w in done)
            ratios.append(refined / max(plain, 1e-12))
        fine = base.get("bits") == 8 or "8" in base.get("format", "")  # nothing left to gain
        assert sum(ratios) / 4 < (1.05 if fine else 1.0), ratios


def slow_descent(grid: Grid, weight: Tensor, hessian: Tensor) -> Tensor:
    """Each weight in turn to the grid point with the least loss, all points tried; O(levels * in^3) a row."""
    values = dense(grid).double()
    codes = torch.arange(grid.levels).double() - (grid.levels - 1) / 2
    for row in range(len(values)):
        points = codes * float(grid.scale[row, 0])
        for column in range(values.shape[1]):
            losses = []
            for point in points:
                trial = values[row].clone()
                trial[column] = point
                error = weight[row].double() - trial
                losses.append(float(error @ hessian @ error))
            values[row, column] = points[int(torch.tensor(losses).argmin())]
    return values


def test_one_visit_is_the_best_move_of_every_weight_in_turn() -> None:
    weight, inputs = gaussian(5, 20), correlated(400, 20)
    hessian = damped_moment(inputs, 0.1)
    grid = compressed(weight, inputs, {"method": "rtn", "bits": 3}).approx
    assert isinstance(grid, Grid)
    mine = dense(descend(grid, weight, hessian.float()))
    torch.testing.assert_close(mine.double(), slow_descent(grid, weight, hessian), rtol=1e-5, atol=1e-6)


def test_kept_values_of_a_pruned_matrix_reach_least_squares() -> None:
    """With the mask fixed, the loss has one minimum; many visits must find it."""
    weight, inputs = gaussian(6, 16), correlated(400, 16)
    hessian = damped_moment(inputs, 0.1)
    pruned = compressed(weight, inputs, {"method": "wanda", "sparsity": 0.5}).approx
    assert isinstance(pruned, Where) and isinstance(pruned.inside, Dense)
    wide = Where(pruned.index, Dense(pruned.inside.values.float()), pruned.outside)
    done: Weight = wide
    for _ in range(300):
        done = descend(done, weight, hessian.float())
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, keep in enumerate(pruned.index.inside):
        best[row, keep] = torch.linalg.solve(hessian[keep][:, keep], (hessian @ weight[row].double())[keep])
    torch.testing.assert_close(dense(done).double(), best, rtol=1e-3, atol=1e-5)


def test_scales_are_least_squares() -> None:
    weight, inputs = gaussian(8, 32), correlated(600, 32)
    hessian = damped_moment(inputs, 0.1)
    grid = compressed(weight, inputs, {"method": "rtn", "bits": 1}).approx
    assert isinstance(grid, Grid)
    best = refit_scales(grid, weight, hessian.float())
    for factor in (0.99, 1.01):
        other = Grid(grid.codes, (dense_scale(best) * factor).half(), None, 2, grid.group_size)
        assert loss(weight, other, hessian) > loss(weight, best, hessian)


def dense_scale(w: Weight) -> Tensor:
    assert isinstance(w, Grid)
    return w.scale.float()


@pytest.mark.parametrize("block", [1, 7, 16])
def test_the_block_changes_speed_never_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = gaussian(8, 40), correlated(700, 40)
    expected = compressed(weight, inputs, {"method": "gptq", "bits": 2}, REFINE).approx
    monkeypatch.setattr(engine, "BLOCK", block)
    mine = compressed(weight, inputs, {"method": "gptq", "bits": 2}, REFINE).approx
    assert float((dense(mine) - dense(expected)).abs().gt(1e-5).float().mean()) < 0.02, "more than ties differ"


def test_a_dense_base_is_refused_by_the_plan_and_by_the_run() -> None:
    assert "nothing to polish" in str(refusal(SIZE, REFINE))
    with pytest.raises(RecipeError, match="nothing to polish"):
        apply(layer(gaussian(*SIZE), correlated(100, SIZE[1])), [step(REFINE)])
