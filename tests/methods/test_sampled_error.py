"""The error that a report gives of a large layer, on a share of its rows, beside that of all rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import MANY, SAMPLED, relative_error, sampled_error
from llmcompress.methods.moments import Moments


def case(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Moments]:
    """A matrix, a damaged one whose rows differ in their damage, and moments."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 48, generator=generator)
    damage = torch.randn(rows, 48, generator=generator) * torch.rand(rows, 1, generator=generator)
    x = torch.randn(200, 48, generator=generator) * torch.rand(48, generator=generator)
    return weight, weight + 0.1 * damage, Moments(200.0, outer=x.T @ x)


@pytest.mark.parametrize("rows", [1, 100, MANY - 1])
def test_few_rows_are_all_measured(rows: int) -> None:
    weight, approx, moments = case(rows)
    assert sampled_error(weight, approx, moments) == relative_error(weight, approx, moments)
    assert sampled_error(weight, approx, None) == relative_error(weight, approx)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [MANY, 3 * MANY + 1])
def test_a_share_of_many_rows_tells_the_error(rows: int, seed: int) -> None:
    """Four standard errors of SAMPLED rows, whose squared damage is spread by 0.9 of its mean."""
    weight, approx, moments = case(rows, seed)
    found, whole = sampled_error(weight, approx, moments), relative_error(weight, approx, moments)
    assert abs(found / whole - 1) < 4 * 0.95 / SAMPLED**0.5
    assert found != whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_row_is_never_missed(bad: float) -> None:
    weight, approx, moments = case(MANY)
    for row in (0, 1, MANY // 2 + 1, MANY - 1):
        damaged = approx.clone()
        damaged[row, 7] = bad
        assert not sampled_error(weight, damaged, moments) < float("inf")
