"""Baseline plans, uniform and random, of the size that an allocation has: the allocation must beat them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from llmcompress.allocation.choices import Choices
from llmcompress.allocation.prices import MatrixPrices, damage
from llmcompress.recipe.target import Target

Costs = Sequence[Sequence[float]]  # by matrix, then by option
RANDOM = 8  # plans, of which the mean is reported
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in 0..1, however many are taken


def predicted_baselines(
    choices: Choices, prices: Sequence[MatrixPrices], target: Target, chosen: Sequence[int]
) -> dict[str, float]:
    """Return the predicted KL of plans of the size of `chosen`, without plans that do not fit.

    "uniform": the same option for every matrix as far as that fits; "random": the mean of several random plans.
    """
    costs = [matrix.costs(target) for matrix in choices.matrices]
    limit = total_cost(costs, chosen)
    uniform = uniform_plan(costs, limit)
    plans = [random_plan(costs, limit, Random(seed)) for seed in range(RANDOM)]
    random = [damage(prices, plan) for plan in plans if plan is not None]
    return {
        **({} if uniform is None else {"uniform": damage(prices, uniform)}),
        **({"random": sum(random) / len(random)} if random else {}),
    }


def uniform_plan(costs: Costs, limit: float) -> tuple[int, ...] | None:
    """Return the same option for every matrix, counted from its cheapest one: the last that fits all of them.

    Then as many matrices as fit, spread evenly over the depth, get one step more. None if nothing fits.
    """
    ladders = [cheapest_first(row) for row in costs]
    level = -1
    while level + 1 < max(map(len, ladders)) and total_cost(costs, _at(ladders, level + 1)) <= limit:
        level += 1
    return None if level < 0 else fill_up(costs, _at(ladders, level), limit, spread_over_depth(len(costs)), steps=1)


def random_plan(costs: Costs, limit: float, random: Random) -> tuple[int, ...] | None:
    """Return a random option for every matrix, then random ones made cheaper or dearer until no more fits.

    None if nothing fits.
    """
    ladders = [cheapest_first(row) for row in costs]
    if total_cost(costs, _at(ladders, 0)) > limit:
        return None
    plan = [random.choice(ladder) for ladder in ladders]
    while total_cost(costs, plan) > limit:
        number = random.randrange(len(plan))
        place = ladders[number].index(plan[number])
        plan[number] = ladders[number][max(place - 1, 0)]
    order = random.sample(range(len(plan)), len(plan))
    return fill_up(costs, plan, limit, order, steps=max(map(len, ladders)))


def fill_up(costs: Costs, plan: Sequence[int], limit: float, order: Sequence[int], steps: int) -> tuple[int, ...]:
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


def total_cost(costs: Costs, plan: Sequence[int]) -> float:
    """Return the cost of a plan: the sum over its options."""
    return sum(row[option] for row, option in zip(costs, plan, strict=True))


def _at(ladders: Sequence[list[int]], level: int) -> list[int]:
    return [ladder[min(level, len(ladder) - 1)] for ladder in ladders]
