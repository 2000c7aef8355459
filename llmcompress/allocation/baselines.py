"""Plans of the same size that nobody thought about: what an allocation has to beat, and to predict."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from llmcompress.allocation.choices import Choices
from llmcompress.allocation.prices import Priced, damage
from llmcompress.recipe.target import Target

Costs = Sequence[Sequence[float]]  # by matrix, then by option
RANDOM = 8  # plans whose mean is told


def predicted_baselines(
    found: Choices, priced: Sequence[Priced], target: Target, chosen: Sequence[int]
) -> dict[str, float]:
    """Return the KL that prices predict for plans of the size of `chosen`: "uniform", the same option for every matrix
    as far as that fits, and "random", the mean of several. Without the one that nothing of this size is."""
    costs = [one.counted(target) for one in found.matrices]
    limit = _total(costs, chosen)
    uniform = uniform_plan(costs, limit)
    drawn = [random_plan(costs, limit, Random(seed)) for seed in range(RANDOM)]
    random = [damage(priced, plan) for plan in drawn if plan is not None]
    return {
        **({} if uniform is None else {"uniform": damage(priced, uniform)}),
        **({"random": sum(random) / len(random)} if random else {}),
    }


def uniform_plan(costs: Costs, limit: float) -> tuple[int, ...] | None:
    """For every matrix the same option, counted from its cheapest one: the last that fits all of them; then one more
    step for as many as the limit lets, spread evenly over the depth. None where nothing fits."""
    ladders = [_ladder(row) for row in costs]
    level = -1
    while level + 1 < max(map(len, ladders)) and _total(costs, _at(ladders, level + 1)) <= limit:
        level += 1
    if level < 0:
        return None
    count = len(costs)
    spread = sorted(range(count), key=lambda number: (number * GOLDEN) % 1)
    return _filled(costs, ladders, _at(ladders, level), limit, spread, steps=1)


def er_plan(costs: Costs, shapes: Sequence[tuple[int, int]], limit: float) -> tuple[int, ...] | None:
    """For every matrix the dearest option that keeps no more of its weights than a share proportional to the sum of its
    sides by their product, as of an Erdos-Renyi graph; the proportion is the largest that the limit lets. `costs`: kept
    weights. None where nothing fits."""
    sides = [(out + width) / (out * width) for out, width in shapes]

    def plan(scale: float) -> tuple[int, ...]:
        """Return the plan of a proportion."""
        rooms = (scale * side * out * width for side, (out, width) in zip(sides, shapes, strict=True))
        fitting = ([n for n in _ladder(row) if row[n] <= room] for row, room in zip(costs, rooms, strict=True))
        return tuple((fits or _ladder(row)[:1])[-1] for fits, row in zip(fitting, costs, strict=True))

    if _total(costs, plan(0.0)) > limit:
        return None
    low, high = 0.0, 1 / min(sides)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(costs, plan(middle)) <= limit else (low, middle)
    ladders = [_ladder(row) for row in costs]
    spread = sorted(range(len(costs)), key=lambda number: (number * GOLDEN) % 1)
    return _filled(costs, ladders, list(plan(low)), limit, spread, steps=1)


GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in 0..1, however many are taken


def random_plan(costs: Costs, limit: float, random: Random) -> tuple[int, ...] | None:
    """A random option for every matrix, then random ones made cheaper or dearer until no more fits. None where nothing
    fits."""
    ladders = [_ladder(row) for row in costs]
    if _total(costs, _at(ladders, 0)) > limit:
        return None
    plan = [random.choice(ladder) for ladder in ladders]
    while _total(costs, plan) > limit:
        number = random.randrange(len(plan))
        place = ladders[number].index(plan[number])
        plan[number] = ladders[number][max(place - 1, 0)]
    order = random.sample(range(len(plan)), len(plan))
    return _filled(costs, ladders, plan, limit, order, steps=max(map(len, ladders)))


def _ladder(row: Sequence[float]) -> list[int]:
    """A matrix's options, cheapest first."""
    return sorted(range(len(row)), key=lambda option: row[option])


def _at(ladders: Sequence[list[int]], level: int) -> list[int]:
    return [ladder[min(level, len(ladder) - 1)] for ladder in ladders]


def _total(costs: Costs, plan: Sequence[int]) -> float:
    return sum(row[option] for row, option in zip(costs, plan, strict=True))


def _filled(
    costs: Costs, ladders: Sequence[list[int]], plan: list[int], limit: float, order: Sequence[int], steps: int
) -> tuple[int, ...]:
    """The plan with matrices in `order` moved up their ladders, a step at a time, wherever that fits."""
    plan, used = list(plan), _total(costs, plan)
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
