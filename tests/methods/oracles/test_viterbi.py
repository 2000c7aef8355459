"""The search for codes against one in plain float32 arrays: which of two ways it finds is no accident."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmcompress.methods.solvers import viterbi_numba
from llmcompress.methods.solvers.viterbi import search
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


SEARCHES = """
import hashlib
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from llmcompress.methods.solvers.viterbi import compiled, search
from llmcompress.weight.trellis import Trellis
found = hashlib.sha256()
for kind in ((2, 1, 8), (1, 1, 8), (3, 2, 8), (5, 2, 12)):
    trellis = Trellis(*kind)
    wanted = np.random.default_rng(0).standard_normal((40, trellis.values), dtype=np.float32)
    def states(_):
        return search(trellis)(wanted, np.ones_like(wanted), 0, -1)
    with ThreadPoolExecutor(4) as threads:  # all of them want it first
        several = list(threads.map(states, range(4)))
    assert all(np.array_equal(one, several[0]) for one in several)
    found.update(several[0].tobytes())
    print(sum(compiled(trellis).stats.cache_hits.values()))
print(found.hexdigest())
"""


@pytest.mark.slow
def test_a_search_is_compiled_once_for_all_processes(tmp_path: Path) -> None:
    here = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.check_output([sys.executable, "-c", SEARCHES], env=here, text=True).split() for _ in range(2)]
    assert runs[0][:-1] == ["0"] * 4 and runs[1][:-1] == ["1"] * 4
    assert runs[0][-1] == runs[1][-1]


def test_a_search_works_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(**options: bool) -> Callable[[Any], Any]:
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'find': no locator available")
        return lambda function: function

    monkeypatch.setattr(viterbi_numba, "njit", nowhere)
    assert viterbi_numba.narrow(2, 8, False).__name__ == "find_2_8_False"
