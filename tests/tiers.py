"""The cases that every run of the tests takes, and those that only a full one does (`./scripts/test --all`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Weight, Where
from tests.builders import every_node, random_nestings


def tiered(
    cases: Iterable[Any],
    fast: Callable[[Any], bool],
    name: Callable[[Any], str] = str,
    slow: Callable[[Any], bool] = lambda case: True,
) -> list[ParameterSet]:
    """Return the values of one parameter of a test with their names: fast, else slow, else nightly."""
    return [pytest.param(case, id=name(case), marks=() if fast(case) else tier_of(slow(case))) for case in cases]


def tiered_nightly(cases: Iterable[Any], slow: Callable[[Any], bool]) -> list[ParameterSet]:
    """Return the values of one parameter of a test; those that are not `slow` are marked nightly."""
    return [pytest.param(case, marks=tier_of(slow(case))) for case in cases]


def tier_of(is_slow: bool) -> pytest.MarkDecorator:
    """Return the mark of a case that is slow, or else nightly."""
    return pytest.mark.slow if is_slow else pytest.mark.nightly


def one_in(count: int, cases: Sequence[Any]) -> Callable[[Any], bool]:
    """A question for `tiered`: True for one case in `count`, from the first on."""
    return cases[::count].__contains__


def first_of_each(cases: Iterable[Any], kind: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """A question for `tiered`: True if no earlier case is of this one's kind."""
    first: dict[Any, Any] = {}
    for case in cases:
        first.setdefault(kind(case), case)
    chosen = {id(case) for case in first.values()}
    return lambda case: id(case) in chosen


def expressions(seed: int, count: int, fast: int = 4) -> list[ParameterSet]:
    """Return the cases that judge a law of weights: every node, and `count` random nestings.

    Fast: a node of each kind, and so many nestings. Slow: half of the other nodes, and an eighth of the nestings.
    """
    nodes, nestings = every_node(), random_nestings(seed, count)
    is_first = first_of_each(nodes, lambda w: (type(w), type(w.index) if isinstance(w, Where) else None))
    first = {id(w) for w in nestings[:fast]}
    second = {id(w) for w in nodes[::2] + nestings[: count // 8]}
    cases = nodes + nestings
    return tiered(cases, lambda w: is_first(w) or id(w) in first, _name, slow=lambda w: id(w) in second)


def _name(w: Weight) -> str:
    return describe(w)[:60]
