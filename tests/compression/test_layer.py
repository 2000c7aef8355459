"""The target of a layer: the dense model's outputs, from other inputs."""

from __future__ import annotations

import pytest
import torch

from llmcompress.compression.layers import TARGET_DAMPING, to_dense_outputs
from llmcompress.methods.moments import Moments

NEEDS = frozenset({"square", "outer", "cross"})


@pytest.mark.parametrize("rows, readers", [(8, 1), (8, 5), (48, 1)])
def test_the_target_solves_the_regularised_least_squares(rows: int, readers: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    seen = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    dense = seen + 0.3 * torch.randn(200, 32, generator=generator)
    weight = torch.randn(rows, 32, generator=generator)
    moments = Moments.of(seen, NEEDS, dense_inputs=dense)
    assert moments.cross is not None
    moved = to_dense_outputs(weight, moments, moments.cross, readers)

    x, y = seen.double(), dense.double()
    penalty = TARGET_DAMPING * x.square().sum(0).mean()
    # rows of the identity times a root of the penalty keep W D small, as damping does
    stacked = torch.cat([x, penalty.sqrt() * torch.eye(32, dtype=torch.float64)])
    missing = torch.cat([(y - x) @ weight.double().T, torch.zeros(32, rows, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, missing).solution.T
    assert (moved.double() - expected).norm() < 1e-4 * expected.norm()
    assert ("to_dense_outputs" in moments.derived) == (readers > 1 or rows >= 32)
