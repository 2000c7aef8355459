"""Entries that `ScaledInputs` and `Transpose` stand for, one by one, and who may not hold these."""

from __future__ import annotations

import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.gguf.tensor_types import exact_type
from llmcompress.formats.peft import split_low_rank
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import bits, dense, describe, matmul
from llmcompress.weight.nodes import (
    Bitmap,
    Columns,
    Dense,
    Grid,
    LowRank,
    RotatedInputs,
    ScaledInputs,
    Sum,
    Transpose,
    Weight,
    Where,
    shape,
)
from llmcompress.weight.rows import check_rows, rows
from llmcompress.weight.runtime_formats import compressed_tensors_obstacle
from llmcompress.weight.trainable.relax import Relaxation, relax
from tests.builders import factors, grid, payload_bits, seeded

SIZE = (6, 16)


def selection() -> torch.Tensor:
    return torch.rand(SIZE, generator=seeded(0)) < 0.3


def test_columns_multiply_and_cost_sixteen_bits_each() -> None:
    inner, columns = grid(SIZE, 2, 16, 0, symmetric=True), factors(16, 1)
    w = ScaledInputs(inner, columns)
    for row in range(6):
        for column in range(16):
            expected = float(dense(inner)[row, column]) * float(columns[column])
            assert float(dense(w)[row, column]) == pytest.approx(expected, rel=1e-6)
    assert bits(w) == bits(inner) + 16 * 16 and shape(w) == SIZE
    assert describe(w) == "scaled columns (binary row)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_scaled_exactly_where_their_dtype_allows(dtype: torch.dtype) -> None:
    """Factors are not rounded to the inputs' dtype first."""
    columns = torch.tensor([1 + 2**-10], dtype=torch.float16)  # which bfloat16 would round to 1
    x = torch.tensor([[1024.0]], dtype=dtype)
    found = matmul(x, ScaledInputs(Dense(torch.ones(1, 1)), columns))
    assert found.dtype == dtype and float(found) == float(torch.tensor(1025.0, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("inside", [Columns(selection()[0]), Bitmap(selection())], ids=["columns", "elements"])
def test_a_side_of_a_selection_stores_what_it_shows(inside: Columns | Bitmap) -> None:
    plain, lying = Dense(torch.ones(SIZE)), Transpose(Dense(torch.ones(16, 6)))
    count = int(inside.inside.expand(SIZE).sum())
    w = Where(inside, ScaledInputs(plain, factors(16, 0)), lying)
    assert bits(w) == inside.inside.numel() + 32 * 96 + 16 * 16
    tensors = encode(w)[1]
    assert payload_bits(tensors) == -(-inside.inside.numel() // 8) * 8 + 32 * 96 + 16 * 16
    assert tensors["inside_inner_values"].numel() == count and tensors["outside_inner_values"].numel() == 96 - count


def test_transposed_is_the_transpose() -> None:
    inner = grid((16, 6), 8, 4, 0, symmetric=False)  # groups of four outputs, and of two
    w = Transpose(inner)
    assert shape(w) == SIZE and torch.equal(dense(w), dense(inner).T) and bits(w) == bits(inner)
    assert inner.scale.shape == (16, 2), "a scale for an input column and four rows"
    assert torch.equal(dense(Transpose(w)), dense(inner))
    assert describe(w) == "transposed (3-bit g4 asymmetric)"


def test_rows_of_a_scaled_table_are_looked_up_and_of_a_transposed_one_are_not() -> None:
    w = Where(Bitmap(selection()), ScaledInputs(grid(SIZE, 3, 4, 0, True), factors(16, 0)), grid(SIZE, 2, 16, 1, True))
    chosen = torch.tensor([5, 0, 5])
    torch.testing.assert_close(dense(rows(*encode(w), chosen)), dense(w)[chosen], rtol=0, atol=0)
    with pytest.raises(RecipeError, match="groups along the input"):
        check_rows(Transpose(w))


def test_factors_of_columns_train_as_scales_and_stay_where_they_are_not_positive() -> None:
    columns = factors(16, 0)
    columns[3] = 0
    w = ScaledInputs(grid(SIZE, 2, 16, 0, symmetric=True), columns)
    module = relax(w, Relaxation(frozenset({"scales"})))
    assert module.kinds() == {"inner_scale": "scales", "columns": "scales"}
    with torch.no_grad():
        module.get_parameter("columns").fill_(2.0)
    frozen = module.freeze()
    assert isinstance(frozen, ScaledInputs) and torch.equal(frozen.columns == 0, columns == 0)
    assert bool((frozen.columns[columns > 0] == 2).all()) and torch.equal(module.weight(), dense(frozen))


def test_latents_see_the_target_without_factors_and_lying() -> None:
    plane = grid((16, 6), 256, 6, 1, symmetric=True)
    columns = factors(16, 2)
    columns[5] = 0
    w = ScaledInputs(Transpose(plane), columns)
    nudge = 0.25 * plane.scale.float().T * columns.float()
    latent = relax(w, Relaxation(frozenset({"codes"})), dense(w) + nudge).get_parameter("inner_inner_codes").detach()
    expected = plane.codes.float() + 0.25
    expected[5] -= 0.25
    torch.testing.assert_close(latent.reshape(16, 6), expected, rtol=0, atol=1e-3)


NODES: list[Weight] = [
    ScaledInputs(grid((32, 64), 16, 32, 0, True), factors(64, 0)),
    Transpose(grid((64, 32), 16, 32, 0, True)),
]


@pytest.mark.parametrize("w", NODES, ids=describe)
def test_formats_for_plain_grids_refuse_them(w: Weight) -> None:
    assert isinstance(w, ScaledInputs | Transpose) and isinstance(w.inner, Grid)
    assert compressed_tensors_obstacle(w.inner) is None and "is no single grid" in str(compressed_tensors_obstacle(w))
    with pytest.raises(UnfitError, match="is no single grid"):
        exact_type(w)


@pytest.mark.parametrize("w", NODES, ids=describe)
def test_an_adapter_beside_them_leaves_them_whole(w: Weight) -> None:
    term = LowRank(Dense(torch.randn(32, 2, generator=seeded(0))), Dense(torch.randn(2, 64, generator=seeded(1))))
    signs = torch.rand(64, generator=seeded(2)) < 0.5
    base, found = split_low_rank(RotatedInputs(Sum((w, term)), signs, 64))
    assert found is not None and isinstance(base, RotatedInputs) and torch.equal(dense(base.inner), dense(w))
