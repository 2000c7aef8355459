"""Rows decoded alone are the rows of the decoded matrix, or the expression is refused."""

from __future__ import annotations

import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Weight, shape
from llmcompress.weight.rows import check_rows, rows
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
