"""The search for codes against one in plain float32 arrays: which of two ways it finds is no accident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmcompress.methods.engines import viterbi_numba
from llmcompress.methods.engines.viterbi import arranged, search
from llmcompress.weight.trellis import Trellis, table
from tests.builders import TRELLISES, seeded
from tests.tiers import tiered

Floats = NDArray[np.float32]


def plainly(trellis: Trellis, wanted: Floats, importance: Floats, start: int) -> NDArray[np.int64]:
    """The states of the cheapest way: every sum and product rounded by itself, the lowest of equal ones taken.

    Costs are by state; the sum that all share is taken off in every step, as long as some way leads to the codes 0.
    """
    numbers, parts = table(trellis).numpy(), 1 << trellis.bits
    later = np.arange(1 << trellis.memory) >> trellis.bits  # what a state has in common with the one before it
    costs = np.full(1 << trellis.memory, 2e30, np.float32)
    costs[start] = 0
    lost = []
    for want, weight in zip(wanted, importance, strict=True):
        arriving = costs.reshape(parts, -1)
        lost.append(arriving.argmin(0))
        cheapest = arriving.min(0)
        costs = (cheapest - (cheapest[0] if cheapest[0] < 1e30 else np.float32(0)))[later]
        for value in range(trellis.values):
            number, slope = numbers[:, value], np.float32(-2) * want[value] * weight[value]
            costs = costs + number * (slope + weight[value] * number)
        assert costs.dtype == np.float32
    place = int(costs.reshape(-1, parts).T.argmin())  # ordered by the newest code first
    state = place % len(lost[0]) << trellis.bits | place // len(lost[0])
    way = []
    for oldest in reversed(lost):
        way.append(state)
        state = int(oldest[later[state]]) << (trellis.memory - trellis.bits) | int(later[state])
    assert state == start
    return np.array(way[::-1])


@pytest.mark.parametrize(
    "trellis", tiered([*TRELLISES, Trellis(5, 1, 10), Trellis(5, 2, 12)], lambda one: one.memory < 9)
)
@pytest.mark.parametrize("kind", tiered(["any", "large", "worthless", "doubled"], lambda kind: kind == "any"))
def test_the_way_is_that_of_rounded_sums(trellis: Trellis, kind: str) -> None:
    steps, start = 100, 5
    wanted = torch.randn(steps, trellis.values, generator=seeded(1))
    importance = torch.rand(steps, trellis.values, generator=seeded(2))
    if kind == "large":  # so that small differences are rounded away
        wanted, importance = wanted * 1e3, importance.pow(8) * 1e6
    elif kind == "worthless":  # all ways cost the same
        importance = torch.zeros_like(importance)
    elif kind == "doubled":  # many do
        importance[::2] = 0
    found = search(trellis)(wanted.numpy(), importance.numpy(), start, -1)
    assert np.array_equal(found, plainly(trellis, wanted.numpy(), importance.numpy(), start))


def test_a_search_is_compiled_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    wanted = torch.randn(20, 1, generator=seeded(1)).numpy()
    trellis = Trellis(2, 1, 8)
    numbers, found = arranged(trellis, table(trellis).numpy()), []
    for hits in (0, 1):
        find: Any = viterbi_numba.narrow(2, 8, False)  # as another process would make it
        found.append(find(wanted, np.ones_like(wanted), numbers, 0, -1))
        assert find.stats.cache_hits == {find.signatures[0]: hits} if hits else not find.stats.cache_hits
    assert np.array_equal(*found)


def test_a_search_works_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(**options: bool) -> Callable[[Any], Any]:
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'find': no locator available")
        return lambda function: function

    monkeypatch.setattr(viterbi_numba, "njit", nowhere)
    assert viterbi_numba.narrow(2, 8, False).__name__ == "find"
