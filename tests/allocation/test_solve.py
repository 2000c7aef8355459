"""Choosing one option each: the solver against brute force, dynamic programming and laws, and plans of no thought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from random import Random

import pytest

from llmcompress.allocation import solve as room
from llmcompress.allocation.solve import cheapest_first, fill_up, monotone, random_plan, solve, uniform_plan
from llmcompress.methods.solvers.sparsity import kept_count

Rows = list[list[float]]


def problem(seed: int, units: int, options: int) -> tuple[Rows, Rows]:
    """Damages and whole costs: more cost, less damage, nothing else in common."""
    random = Random(seed)
    cost = [sorted(float(random.randint(1, 60)) for _ in range(options)) for _ in range(units)]
    damage = [sorted((random.random() * 10 ** random.randint(-4, 0) for _ in row), reverse=True) for row in cost]
    return damage, cost


def total(rows: Rows, plan: Sequence[int]) -> float:
    return sum(row[option] for row, option in zip(rows, plan, strict=True))


def least_by_dynamic_programming(damage: Rows, cost: Rows, limit: int) -> float:
    """best[b]: the least damage of the units so far with cost b or less."""
    best = [0.0] * (limit + 1)
    for values, costs in zip(damage, cost, strict=True):
        pairs = list(zip(values, costs, strict=True))
        best = [min((best[b - int(c)] + v for v, c in pairs if c <= b), default=float("inf")) for b in range(limit + 1)]
    return best[limit]


@pytest.mark.parametrize("seed", range(8))
def test_small_problems_are_solved_as_by_trying_everything(seed: int) -> None:
    damage, cost = problem(seed, 5, 4)
    for share in (0.3, 0.5, 0.8):
        limit = share * sum(map(max, cost))
        allowed = [plan for plan in product(range(4), repeat=5) if total(cost, plan) <= limit]
        found = solve(damage, cost, limit)
        assert (found is None) == (not allowed)
        if found is not None:
            assert total(cost, found) <= limit
            assert total(damage, found) == pytest.approx(min(total(damage, plan) for plan in allowed), rel=1e-9)
            # the other way round: the least cost at a damage
            other = solve(cost, damage, total(damage, found) * (1 + 1e-9))
            best = min(total(cost, p) for p in product(range(4), repeat=5) if total(damage, p) <= total(damage, found))
            assert other is not None and total(cost, other) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_larger_problems_are_solved_as_by_dynamic_programming(seed: int) -> None:
    damage, cost = problem(100 + seed, 40, 6)
    limit = int(0.45 * sum(map(max, cost)))
    found = solve(damage, cost, limit)
    assert found is not None and total(cost, found) <= limit
    assert total(damage, found) == pytest.approx(least_by_dynamic_programming(damage, cost, limit), rel=1e-9)


@pytest.mark.slow
def test_costs_that_are_nearly_multiples_end_near_the_bound() -> None:
    """Kept weights of 210 matrices of a few sizes at nine sparsities: an exact proof takes hours."""
    random = Random(0)
    sizes = [576 * 576] * 60 + [576 * 192] * 60 + [1536 * 576] * 90
    shares = [share / 100 for share in range(40, 85, 5)]
    cost = [[float(kept_count(size, share)) for share in shares] for size in sizes]
    scales = [size * math.exp(random.gauss(0, 1)) for size in sizes]
    damage = [[scale * math.exp(5 * share) for share in shares] for scale in scales]
    limit = float(kept_count(sum(sizes), 0.6))
    found = solve(damage, cost, limit)
    assert found is not None and total(cost, found) <= limit

    def bound(price: float) -> float:
        """Return the least damage where a unit of cost has a price, less what the limit is worth: never too high."""
        least = (min(d + price * c for d, c in zip(*row, strict=True)) for row in zip(damage, cost, strict=True))
        return sum(least) - price * limit

    highest = max(bound(math.exp(step / 50)) for step in range(-500, 500))
    assert highest <= total(damage, found) <= highest * 1.002


def test_more_room_never_hurts_and_all_of_it_gives_the_least_damage() -> None:
    damage, cost = problem(7, 12, 5)
    low, high = sum(map(min, cost)), sum(map(max, cost))
    values = []
    for step in range(11):
        plan = solve(damage, cost, low + step / 10 * (high - low))
        assert plan is not None
        values.append(total(damage, plan))
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(sum(map(min, damage)))
    assert solve(damage, cost, low - 1) is None


def test_large_whole_costs_never_exceed_the_limit() -> None:
    damage, cost = problem(3, 60, 6)
    large = [[value * 1_000_003 + 1 for value in row] for row in cost]
    limit = float(int(0.5 * sum(map(max, large))))
    plan = solve(damage, large, limit)
    assert plan is not None and 0.99 * limit < total(large, plan) <= limit


def test_a_limit_just_below_a_whole_cost_is_kept_within_few_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver takes what exceeds the limit by a rounding error for allowed, however often it is asked."""
    damage, cost = problem(7, 14, 6)
    best = solve(damage, cost, 0.5 * sum(map(max, cost)))
    assert best is not None
    searches: list[float] = []
    search = room._milp

    def counted(value: Rows, costs: Rows, limit: float) -> tuple[int, ...]:
        searches.append(limit)
        assert len(searches) < 60
        return search(value, costs, limit)

    monkeypatch.setattr(room, "_milp", counted)
    below = total(cost, best) * (1 - 1e-15)
    found = solve(damage, cost, below)
    assert found is not None and total(cost, found) <= below


def test_geometric_damages_give_reverse_water_filling() -> None:
    """d = a 4^-b with equal sizes: b_u = mean b + log4(a_u / geometric mean of a), rounded, within one bit."""
    scales = [4.0 ** (index / 3) for index in range(-6, 7)]
    bits = [float(b) for b in range(1, 9)]
    damage = [[scale * 4.0**-b for b in bits] for scale in scales]
    plan = solve(damage, [bits] * len(scales), 4.0 * len(scales))
    assert plan is not None
    for index, option in enumerate(plan):
        assert abs(bits[option] - (4.0 + (index - 6) / 3)) <= 1


def test_noise_in_the_prices_is_not_exploited() -> None:
    assert monotone([0.5, 0.1, 0.3, 0.05], [1, 2, 3, 4]) == (0.5, 0.3, 0.3, 0.05)
    assert monotone([0.05, 0.3, 0.1, 0.5], [4, 3, 2, 1]) == (0.05, 0.3, 0.3, 0.5)


def test_a_random_plan_is_added_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models have thousands of matrices, and each of as many changes would add up the costs of all."""
    _, cost = problem(11, 80, 5)
    limit, sums = 0.4 * sum(map(max, cost)), []
    ladders = [cheapest_first(row) for row in cost]

    def slow(random: Random) -> tuple[int, ...]:
        plan = [random.choice(ladder) for ladder in ladders]
        while total(cost, plan) > limit:
            number = random.randrange(len(plan))
            plan[number] = ladders[number][max(ladders[number].index(plan[number]) - 1, 0)]
        return fill_up(cost, plan, limit, random.sample(range(len(plan)), len(plan)), steps=5)

    wanted = [slow(Random(seed)) for seed in range(4)]
    monkeypatch.setattr(room, "total_cost", lambda *given: (sums.append(1), total(*given))[1])
    assert [random_plan(cost, limit, Random(seed)) for seed in range(4)] == wanted and len(sums) <= 4 * 3


@pytest.mark.parametrize("share", [0.35, 0.6, 1.0])
def test_plans_of_no_thought_fill_the_same_size(share: float) -> None:
    damage, cost = problem(11, 80, 5)
    limit = share * sum(map(max, cost))
    best = solve(damage, cost, limit)
    assert best is not None
    one, two = (random_plan(cost, limit, Random(seed)) for seed in (0, 1))
    uniform = uniform_plan(cost, limit)
    assert one == random_plan(cost, limit, Random(0)) and (one != two or share == 1.0)
    assert uniform is not None and max(uniform) - min(uniform) <= 1
    for plan in (one, two, uniform):
        assert plan is not None and total(cost, plan) <= limit
        assert total(damage, plan) >= total(damage, best)
    for plan in (one, two):
        assert total(cost, plan) > 0.97 * limit
    assert uniform_plan(cost, 1) is None and random_plan(cost, 1, Random(0)) is None
