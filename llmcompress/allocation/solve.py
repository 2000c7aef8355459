"""Plans: the least damage at a size, the least size at a damage, and the baselines that an allocation must beat."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from llmcompress.allocation.choices import Choices
from llmcompress.allocation.prices import MatrixPrices, damage
from llmcompress.errors import NumericsError
from llmcompress.recipe.target import Target

LARGE = 1e4  # upper bound of objectives and limits after scaling: the solver treats 1e-6 as zero
ROUNDING = 1e-12
NODES = 300  # of the search: seconds, and within two thousandths of the bound (test_solve.py)
Table = Sequence[Sequence[float]]  # by matrix, then by option
RANDOM = 8  # plans, of which the mean is reported
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in 0..1, however many are taken


def solve(value: Table, cost: Table, limit: float) -> tuple[int, ...] | None:
    """Return an option for each matrix: the least sum of `value` that NODES nodes find with `cost` of at most `limit`.

    Returns None if no choice keeps the limit. Raises NumericsError if the solver gives up.
    """
    cheapest = tuple(min(range(len(row)), key=row.__getitem__) for row in cost)
    least = _total(cost, cheapest)
    if least > limit:
        return None
    bound, step = float(limit), ROUNDING * limit
    while least < bound:
        chosen = _milp(value, cost, bound)
        excess = _total(cost, chosen) - limit
        if excess <= 0:
            return chosen
        step = max(excess, 2 * step)  # the solver may exceed its bound by a rounding error, many times as large as this
        bound -= step
    return cheapest


def _total(table: Table, chosen: Sequence[int]) -> float:
    return sum(row[option] for row, option in zip(table, chosen, strict=True))


def _milp(value: Table, cost: Table, limit: float) -> tuple[int, ...]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    counts = [len(row) for row in value]
    owner = np.repeat(np.arange(len(counts)), counts)
    flat = np.concatenate([np.asarray(row, float) for row in value])
    used = np.concatenate([np.asarray(row, float) for row in cost])
    each_once = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    largest = max(float(np.abs(flat).sum()), np.finfo(float).tiny)
    solution = milp(
        flat * (LARGE / largest),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(each_once, 1, 1), LinearConstraint(used[None] * (LARGE / limit), -np.inf, LARGE)],
        options={"mip_rel_gap": 0, "node_limit": NODES},
    )
    if solution.x is None:
        raise NumericsError(f"no option could be chosen for every layer ({solution.message}); ask for another size")
    return tuple(int(shares.argmax()) for shares in np.split(solution.x, np.cumsum(counts)[:-1]))


def monotone(damage: Sequence[float], cost: Sequence[float]) -> tuple[float, ...]:
    """Return the damage of one matrix's options, raised so that none is below that of an option with more cost.

    By noise, measured ones can be, and a solver would pick exactly these.
    """
    rising = sorted(range(len(cost)), key=lambda option: (-cost[option], damage[option]))
    raised, worst = list(damage), 0.0
    for option in rising:
        worst = max(worst, damage[option])
        raised[option] = worst
    return tuple(raised)


def predicted_baselines(
    choices: Choices, prices: Sequence[MatrixPrices], target: Target, chosen: Sequence[int]
) -> dict[str, float]:
    """Return the predicted KL of plans of the size of `chosen`, without plans that do not fit.

    "uniform": the same option for every matrix as far as that fits; "random": the mean of several random plans.
    """
    own = [matrix.costs(target) for matrix in choices.matrices]
    costs, limit = choices.add_rows(own), total_cost(own, chosen)
    uniform = uniform_plan(costs, limit)
    plans = [random_plan(costs, limit, Random(seed)) for seed in range(RANDOM)]
    random = [damage(prices, choices.expand(plan)) for plan in plans if plan is not None]
    return {
        **({} if uniform is None else {"uniform": damage(prices, choices.expand(uniform))}),
        **({"random": sum(random) / len(random)} if random else {}),
    }


def uniform_plan(costs: Table, limit: float) -> tuple[int, ...] | None:
    """Return the same option for every matrix, counted from its cheapest one: the last that fits all of them.

    Then as many matrices as fit, spread evenly over the depth, get one step more. None if nothing fits.
    """
    ladders = [cheapest_first(row) for row in costs]
    level = -1
    while level + 1 < max(map(len, ladders)) and total_cost(costs, _at(ladders, level + 1)) <= limit:
        level += 1
    return None if level < 0 else fill_up(costs, _at(ladders, level), limit, spread_over_depth(len(costs)), steps=1)


def random_plan(costs: Table, limit: float, random: Random) -> tuple[int, ...] | None:
    """Return a random option for every matrix, then random ones made cheaper or dearer until no more fits.

    None if nothing fits.
    """
    ladders = [cheapest_first(row) for row in costs]
    if total_cost(costs, _at(ladders, 0)) > limit:
        return None
    plan = [random.choice(ladder) for ladder in ladders]
    used = total_cost(costs, plan)
    while used > limit:  # costs are whole numbers, so their sum stays exact
        number = random.randrange(len(plan))
        place = ladders[number].index(plan[number])
        cheaper = ladders[number][max(place - 1, 0)]
        used += costs[number][cheaper] - costs[number][plan[number]]
        plan[number] = cheaper
    order = random.sample(range(len(plan)), len(plan))
    return fill_up(costs, plan, limit, order, steps=max(map(len, ladders)))


def fill_up(costs: Table, plan: Sequence[int], limit: float, order: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the plan with matrices in `order` given dearer options, a step at a time, wherever that fits."""
    ladders = [cheapest_first(row) for row in costs]
    plan, used = list(plan), total_cost(costs, plan)
    for _ in range(steps):
        for number in order:
            place = ladders[number].index(plan[number])
            if place + 1 == len(ladders[number]):
                continue
            dearer = ladders[number][place + 1]
            more = costs[number][dearer] - costs[number][plan[number]]
            if used + more <= limit:
                plan[number], used = dearer, used + more
    return tuple(plan)


def cheapest_first(row: Sequence[float]) -> list[int]:
    """Return a matrix's options, cheapest first."""
    return sorted(range(len(row)), key=lambda option: row[option])


def spread_over_depth(count: int) -> list[int]:
    """Return the numbers of `count` matrices in an order whose every beginning is spread evenly."""
    return sorted(range(count), key=lambda number: (number * GOLDEN) % 1)


def total_cost(costs: Table, plan: Sequence[int]) -> float:
    """Return the cost of a plan: the sum over its options."""
    return sum(row[option] for row, option in zip(costs, plan, strict=True))


def _at(ladders: Sequence[list[int]], level: int) -> list[int]:
    return [ladder[min(level, len(ladder) - 1)] for ladder in ladders]
