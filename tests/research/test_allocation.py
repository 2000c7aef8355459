"""Plans that only the benchmark of allocations compares with."""

from __future__ import annotations

from allocation import er_plan


def test_er_plans_keep_more_of_small_matrices() -> None:
    shapes = [(64, 64), (256, 64), (256, 256)]
    costs = [[out * width * share // 10 for share in range(1, 10)] for out, width in shapes]
    total = sum(out * width for out, width in shapes)
    plan = er_plan(costs, shapes, total // 2)
    assert plan is not None and plan[0] >= plan[1] >= plan[2] and plan[0] > plan[2]
    assert sum(row[option] for row, option in zip(costs, plan, strict=True)) <= total // 2
    assert er_plan(costs, shapes, total // 20) is None
