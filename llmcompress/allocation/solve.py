"""One option for every matrix: the least total damage at a size, or the least size at a damage.

A multiple-choice knapsack: minimise sum_u d[u, o_u] over the choices o with sum_u c[u, o_u] <= limit. It is solved as
a mixed-integer programme, by HiGHS through scipy; a few hundred matrices with a handful of options take a second. With
damages to several kinds of text, one more variable is above each of their sums, and is minimised. If costs are
multiples of a few numbers, as numbers of zeros are, nearly every choice is as good as another, and a proof of the best
one takes hours. So the search ends after NODES nodes, with the best choice so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmcompress.errors import NumericsError

LARGE = 1e4  # upper bound of objectives and limits after scaling: the solver treats 1e-6 as zero
ROUNDING = 1e-12
NODES = 300  # of the search: seconds, and within two thousandths of the bound (test_solve.py)
TIE = 0.01  # weight of the mean beside the largest of several sums: kinds that are not the worst count too

Table = Sequence[Sequence[float]]  # by matrix, then by option


def solve(value: Table, cost: Table, limit: float, kinds: Sequence[Table] = ()) -> tuple[int, ...] | None:
    """Return an option for each matrix: the least sum of `value` that NODES nodes find with `cost` of at most `limit`.

    With values of `kinds`, what is least is the largest of their sums plus TIE times that of `value`. Returns None if
    no choice keeps the limit. Raises NumericsError if the solver gives up.
    """
    cheapest = tuple(min(range(len(row)), key=row.__getitem__) for row in cost)
    least = _total(cost, cheapest)
    if least > limit:
        return None
    bound, step = float(limit), ROUNDING * limit
    while least < bound:
        chosen = _milp(value, cost, bound, kinds)
        excess = _total(cost, chosen) - limit
        if excess <= 0:
            return chosen
        step = max(excess, 2 * step)  # the solver may exceed its bound by a rounding error, many times as large as this
        bound -= step
    return cheapest


def _total(table: Table, chosen: Sequence[int]) -> float:
    return sum(row[option] for row, option in zip(table, chosen, strict=True))


def _milp(value: Table, cost: Table, limit: float, kinds: Sequence[Table]) -> tuple[int, ...]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    counts = [len(row) for row in value]
    owner = np.repeat(np.arange(len(counts)), counts)
    flat, used, *sums = (np.concatenate([np.asarray(row, float) for row in table]) for table in (value, cost, *kinds))
    size, above = len(owner), 1 if kinds else 0  # the last variable is above the sum of each kind
    each_once = csr_matrix((np.ones(size), (owner, np.arange(size))), shape=(len(counts), size + above))
    scale = LARGE / max(*(float(np.abs(table).sum()) for table in (flat, *sums)), np.finfo(float).tiny)
    within = np.append(used * (LARGE / limit), np.zeros(above))
    constraints = [LinearConstraint(each_once, 1, 1), LinearConstraint(within[None], -np.inf, LARGE)]
    constraints += [LinearConstraint(np.append(table * scale, -1.0)[None], -np.inf, 0) for table in sums]
    solution = milp(
        np.append(flat * scale * (TIE if kinds else 1), np.ones(above)),
        integrality=np.append(np.ones(size), np.zeros(above)),
        bounds=Bounds(0, np.append(np.ones(size), np.full(above, np.inf))),
        constraints=constraints,
        options={"mip_rel_gap": 0, "node_limit": NODES},
    )
    if solution.x is None:
        raise NumericsError(f"no option could be chosen for every layer ({solution.message}); ask for another size")
    return tuple(int(shares.argmax()) for shares in np.split(solution.x[:size], np.cumsum(counts)[:-1]))


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
