"""Rows that kernels decode against rows of the dense matrix."""

from __future__ import annotations

import pytest
import torch

from llmcompress.kernels.cpu.prefill import decode_rows
from llmcompress.kernels.cpu.prepare import prepare
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import RotatedInputs, ScaledInputs, Weight
from llmcompress.weight.trellis import Trellis
from tests.builders import grid, seeded, streams

SIGNS = torch.rand(96, generator=seeded(1)) < 0.5
TABLES = [
    grid((100, 96), 16, 32, 1, symmetric=True),
    RotatedInputs(grid((40, 96), 16, 32, 2, symmetric=False), SIGNS, 32),
    RotatedInputs(streams(Trellis(2, 1, 12), 128, 96, 768), SIGNS, 32),
    ScaledInputs(grid((33, 50), 256, 1000, 3, symmetric=True), torch.rand(50, generator=seeded(4)).half()),
]


@pytest.mark.parametrize("w", TABLES, ids=describe)
def test_decode_rows_equals_the_dense_matrix(w: Weight) -> None:
    rows, prepared = dense(w), prepare(w)
    assert prepared is not None and prepared.plain is not None
    last = len(rows) - 1
    for places in ([0], [last], [last, 3, 17, 3]):
        torch.testing.assert_close(decode_rows(prepared.plain, places), rows[places], rtol=1e-5, atol=1e-5)
