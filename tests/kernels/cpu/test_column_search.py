"""The search for the nearest streams of a trellis: against one in plain numpy state for state, on every tier."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.kernels.column_block import ColumnBlock, whole_weights
from llmcompress.kernels.cpu import build, column_search
from llmcompress.kernels.cpu.instruction_sets import Tier
from llmcompress.methods.solvers import block_search
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.weight.trellis import Trellis
from tests.builders import RINGS, TRELLISES, seeded
from tests.kernels.cpu.test_products import every_tier
from tests.methods.oracles.columns import fused, numbers_of, plainly, searched
from tests.tiers import tiered

KINDS = [*TRELLISES, Trellis(5, 1, 10), Trellis(5, 2, 12), Trellis(4, 1, 8), Trellis(2, 1, 4), Trellis(2, 1, 12)]
KINDS += [*RINGS, Trellis(4, 1, 8, ring=True)]


@pytest.mark.parametrize("trellis", tiered(KINDS, lambda trellis: trellis.memory < 9), ids=str)
@pytest.mark.parametrize("kind", tiered(["any", "large", "worthless", "doubled"], lambda kind: kind == "any"))
@pytest.mark.parametrize("end, steps", [(-1, 100), (9, 100), (-1, 161)])
def test_the_chosen_path_has_the_lowest_whole_cost(trellis: Trellis, kind: str, end: int, steps: int) -> None:
    start = 5
    wanted = torch.randn(steps, trellis.values, generator=seeded(1))
    importance = torch.rand(steps, trellis.values, generator=seeded(2))
    if kind == "large":  # further away than any number, and some count for nothing beside others
        wanted, importance = wanted * 1e3, importance.pow(8) * 1e6
    elif kind == "worthless":  # all ways cost the same
        importance = torch.zeros_like(importance)
    elif kind == "doubled":  # many do
        importance[::2] = 0
    found = searched(trellis, wanted, importance, start, end).numpy()
    assert np.array_equal(found, plainly(trellis, wanted, importance, start, end))
    if trellis.ring:
        assert np.array_equal(np.roll(found, 1) % (1 << trellis.memory - trellis.bits), found >> trellis.bits)


@every_tier
@pytest.mark.parametrize(
    "trellis", [Trellis(2, 1, 8), Trellis(2, 1, 8, ring=True), Trellis(3, 2, 9), Trellis(4, 1, 8)], ids=str
)
def test_every_tier_chooses_the_same_path(trellis: Trellis, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.randn(60, trellis.values, generator=seeded(3))
    expected = plainly(trellis, wanted, torch.ones_like(wanted), 0, -1)
    monkeypatch.setattr(column_search, "load_kernel", lambda kernel: build.load_kernel(kernel, tier))
    assert np.array_equal(searched(trellis, wanted, torch.ones_like(wanted)).numpy(), expected)


def block_of(trellis: Trellis, **more: Any) -> ColumnBlock:
    """Three columns of three streams, a row of zeros among them; the last stream ends its second column as told."""
    edges = (0, 7, 14, 29) if trellis.ring else (0, 7, 8, 29)
    rows = edges[-1] * trellis.values
    factors = torch.rand(rows, generator=seeded(4)) + 0.5
    factors[3] = 0
    ends = torch.full((4, 3), -1, dtype=torch.int32)
    ends[0], ends[2, 2] = torch.tensor([0, 5, 3]), 9
    wanted = torch.randn(3, rows, generator=seeded(5))
    return ColumnBlock(wanted, whole_weights(factors.square(), trellis), factors, edges, ends, **more)


@pytest.mark.parametrize(
    "trellis", tiered([*TRELLISES, *RINGS], lambda trellis: trellis.memory < 9 or trellis == RINGS[1], str)
)
@pytest.mark.parametrize("again", [False, True])
def test_errors_move_later_columns(trellis: Trellis, again: bool) -> None:
    """One column after the other by the search alone, errors fed on by numpy: the same numbers, states and ends."""
    shares = torch.randn(3, 3, generator=seeded(6)) * 0.3
    before = torch.randn(3, 29 * trellis.values, generator=seeded(7)) if again else None
    block = block_of(trellis, shares=shares, before=before)
    given = replace(block, current=block.current.clone(), ends=block.ends.clone())
    states, errors = choose_columns(block, numbers_of(trellis))
    current = given.current.numpy()
    for column in range(3):
        alone = ColumnBlock(
            given.current[column : column + 1].clone(), given.weights, given.factors, given.edges,
            given.ends[column : column + 2].clone(),
        )  # fmt: skip
        expected = choose_columns(alone, numbers_of(trellis))[0]
        given.ends[column + 1] = alone.ends[1]
        stored = alone.current[0].numpy()
        error = stored - before[column].numpy() if before is not None else current[column] - stored
        for later in range(column + 1, 3):
            current[later] = fused(error, -shares[column, later].numpy(), current[later])
        assert torch.equal(states[column], expected[0])
        assert np.array_equal(errors[column].numpy(), error) and np.array_equal(block.current[column].numpy(), stored)
    assert torch.equal(block.ends, given.ends)
    assert int(block.current[:, 3].count_nonzero()) == 0, "a row of zeros stays one"


def test_a_block_equals_its_columns_one_by_one() -> None:
    """A state shifts a code into the one before it, the last one of the column before included."""
    trellis = TRELLISES[1]
    block = block_of(trellis)
    states, _ = choose_columns(block, numbers_of(trellis))
    rest = (1 << (trellis.memory - trellis.bits)) - 1
    for number, (first, last) in enumerate(pairwise(block.edges)):
        way = torch.cat([block.ends[:1, number], states[:, first:last].reshape(-1)])
        assert torch.equal(way[1:] >> trellis.bits, way[:-1] & rest)
    assert int(block.ends[2, 2]) & rest == 9


def test_chunks_of_streams_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that do not fit the room together go one after the other."""
    trellis = TRELLISES[1]
    expected = choose_columns(block_of(trellis), numbers_of(trellis))[0]
    monkeypatch.setattr(block_search, "ROOM", 1)
    assert torch.equal(choose_columns(block_of(trellis), numbers_of(trellis))[0], expected)
    elsewhere = block_of(trellis)
    assert torch.equal(block_search.choose_on_cpu(elsewhere, numbers_of(trellis))[0], expected)


def test_whole_weights_are_bounded_by_the_median() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 1.0, 1e6])
    found = whole_weights(weights, Trellis(2, 1, 8))
    assert torch.equal(found, torch.tensor([0.0, 512.0, 1024.0, 512.0, 4096.0]))
    assert torch.equal(whole_weights(torch.zeros(3), Trellis(2, 1, 8)), torch.zeros(3))
