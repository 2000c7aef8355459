"""Pieces of text by how near they are to their kind."""

from __future__ import annotations

import numpy as np
import prototypes


def test_what_lies_between_groups_is_odd_and_what_lies_in_one_is_not() -> None:
    draws = np.random.default_rng(0).normal(0, 0.05, (40, 3))
    rows = draws + np.repeat(np.eye(3)[:2], 20, axis=0)
    rows[7], rows[30] = [0.6, 0.5, 0.6], [-0.2, 1, 1.5]
    found = prototypes.distances(rows * np.linspace(1, 9, 40)[:, None], 2)  # sizes do not count
    assert set(found.argsort()[-2:]) == {7, 30} and found.min() >= 0
