"""Rows decoded alone are the rows of the decoded matrix, or the expression is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.modules import CompressedEmbedding
from llmcompress.weight.nodes import Weight, shape
from llmcompress.weight.rows import check_rows, rows
from tests.builders import grid
from tests.tiers import expressions


@pytest.mark.parametrize("w", expressions(seed=2, count=80))
def test_rows_of_the_packed_form(w: Weight) -> None:
    chosen = torch.arange(shape(w)[0]).flip(0).repeat(2)
    try:
        check_rows(w)
    except RecipeError as error:
        assert "cannot be looked up one by one" in str(error)
        with pytest.raises(TypeError, match="no rows of its own"):
            rows(*encode(w), chosen)
        return
    for some in (chosen, chosen[:0]):
        torch.testing.assert_close(dense(rows(*encode(w), some)), dense(w)[some], rtol=1e-5, atol=1e-5)


def test_many_rows_of_a_table_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = grid((2500, 16), 4, 16, seed=0, symmetric=True)
    table, counts = CompressedEmbedding(*pack_weight(w), torch.float32), list[int]()

    def counted(header: dict[str, Any], tensors: Mapping[str, Tensor], chosen: Tensor) -> Weight:
        counts.append(len(chosen))
        return rows(header, tensors, chosen)

    monkeypatch.setattr("llmcompress.weight.modules.rows", counted)
    ids = torch.arange(2500).flip(0).reshape(50, 50)
    assert torch.equal(table(ids), dense(w)[ids]) and counts == [1024, 1024, 452]
    assert table(ids[:0]).shape == (0, 50, 16)
