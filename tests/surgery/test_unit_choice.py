"""Units that go: the error is that of least squares, and what is redundant goes first."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmcompress.surgery.unit_choice import BY, UnitScore, choose_units


def problem(width: int, out: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight `[out, width]` and a second moment of correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, dtype=torch.float64, generator=draw)
    x = x @ torch.randn(width, width, dtype=torch.float64, generator=draw)
    return torch.randn(out, width, dtype=torch.float64, generator=draw), x.T @ x / len(x)


def refitted(weight: Tensor, hessian: Tensor, columns: list[int]) -> tuple[Tensor, float]:
    """The least-squares weights on some columns, and their share of the error, from the normal equations."""
    new = torch.zeros_like(weight)
    new[:, columns] = torch.linalg.solve(hessian[columns][:, columns], hessian[columns] @ weight.T).T
    change = new - weight
    return new, float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("size", [1, 3])
def test_choose_units_refits_by_least_squares(by: str, size: int) -> None:
    weight, hessian = problem(12)
    found = choose_units(weight, hessian, 12 // size - 2, size, UnitScore(by))
    columns = [unit * size + i for unit in found.numbers for i in range(size)]
    expected, error = refitted(weight, hessian, columns)
    torch.testing.assert_close(found.weight, expected, rtol=1e-7, atol=1e-9)
    assert found.error == pytest.approx(error, rel=1e-7)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_subset_removes_the_cheapest_unit_each_time(size: int, seed: int) -> None:
    """Fewer than the portions, so one at a time: each the one whose absence costs least then."""
    weight, hessian = problem(10, seed=seed)
    stays = list(range(10 // size))
    for _ in range(3):
        columns = {unit: [u * size + i for u in stays if u != unit for i in range(size)] for unit in stays}
        stays.remove(min(stays, key=lambda unit: refitted(weight, hessian, columns[unit])[1]))
    assert choose_units(weight, hessian, 10 // size - 3, size, UnitScore("subset")).numbers == tuple(stays)


@pytest.mark.parametrize("seed", range(3))
def test_subset_is_among_the_better_half_of_all_subsets(seed: int) -> None:
    weight, hessian = problem(8, seed=seed)
    errors = [refitted(weight, hessian, list(kept))[1] for kept in combinations(range(8), 5)]
    found = choose_units(weight, hessian, 5, score=UnitScore("subset"))
    assert min(errors) * (1 - 1e-9) <= found.error <= sorted(errors)[len(errors) // 2]


def test_subset_removes_a_redundant_unit_of_large_norm() -> None:
    """Norms keep a loud unit that another one can stand in for; a subset is of units that need each other least."""
    weight, hessian = problem(9)
    spread = torch.eye(9, dtype=torch.float64)
    spread[3, 3] = 10
    spread[:, 8] = 5 * spread[:, 3]  # x_8 is 5 x_3, and both are loud
    hessian = spread.T @ hessian @ spread
    hessian.diagonal().add_(1e-9)
    found = choose_units(weight, hessian, 8, score=UnitScore("subset"))
    assert not {3, 8} <= set(found.numbers) and found.error < 1e-9
    loud = choose_units(weight, hessian, 8, score=UnitScore("energy"))
    assert {3, 8} <= set(loud.numbers) and loud.error > 100 * found.error


def test_random_units_depend_on_the_seed_only() -> None:
    weight, hessian = problem(12)
    kept = [choose_units(weight, hessian, 6, score=UnitScore("random", seed)).numbers for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
