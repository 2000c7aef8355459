"""Every node, and random nestings of them, obey the laws that the rest of the project relies on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.expression import bits, decoded, dense, describe, matmul
from llmcompress.weight.hadamard import ROWS, rotate, unrotate
from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Columns,
    Dense,
    Grid,
    LowRank,
    RotatedInputs,
    ScaledInputs,
    Sum,
    Weight,
    Where,
    Zero,
    shape,
)
from tests.builders import every_node, grid, pattern, payload_bits, random_nestings, seeded
from tests.tiers import expressions

SEED, NESTINGS = 0, 60
EXPRESSIONS = expressions(SEED, NESTINGS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "w" in metafunc.fixturenames:
        metafunc.parametrize("w", EXPRESSIONS)


def inputs(w: Weight, rows: int = 5) -> Tensor:
    return torch.randn(rows, shape(w)[1], generator=seeded(9))


def test_the_random_nestings_cover_every_node() -> None:
    text = json.dumps([encode(w)[0] for w in random_nestings(SEED, NESTINGS)])
    names = "zero dense grid codebook low_rank where rotated scaled transposed sum columns bitmap pattern"
    for name in names.split():
        assert f'"{name}"' in text, f"no random nesting contains {name}; raise their count or change the seed"


def test_decode_undoes_encode(w: Weight) -> None:
    header, tensors = encode(w)
    again = decode(json.loads(json.dumps(header)), tensors)
    assert torch.equal(dense(again), dense(w)), "not bit-identical"
    assert shape(again) == shape(w) and bits(again) == bits(w) and describe(again) == describe(w)
    second_header, second = encode(again)
    assert second_header == header and list(second) == list(tensors)
    assert all(torch.equal(second[name], tensors[name]) for name in tensors)


def test_decode_gives_back_every_field_of_an_unselected_leaf() -> None:
    for w in every_node():
        again = decode(*encode(w))
        match w, again:
            case Dense(values), Dense(read):
                assert read.dtype == values.dtype and torch.equal(read, values)
            case Grid(codes, scale, zero, levels, size), Grid(codes_, scale_, zero_, levels_, size_):
                assert torch.equal(codes, codes_) and codes_.dtype == torch.uint8
                assert torch.equal(scale, scale_) and scale_.dtype == torch.float16
                assert (zero is None) == (zero_ is None) and (zero is None or torch.equal(zero, zero_))
                assert (levels, size) == (levels_, size_)
            case ScaledInputs(columns=columns), ScaledInputs(columns=columns_):
                assert torch.equal(columns, columns_) and columns_.dtype == torch.float16
            case Codebook(codes, centroids, scale, width), Codebook(codes_, centroids_, scale_, width_):
                assert torch.equal(codes, codes_) and codes_.dtype == torch.uint8 and width == width_
                assert torch.equal(centroids, centroids_) and centroids_.dtype == torch.float16
                assert torch.equal(scale, scale_) and scale_.dtype == torch.float16
            case RotatedInputs(_, signs, block), RotatedInputs(_, signs_, block_):
                assert torch.equal(signs, signs_) and block == block_
            case Where(index), Where(index_):
                assert type(index) is type(index_) and torch.equal(index.inside, index_.inside)


def test_counted_bits_are_written_bits(w: Weight) -> None:
    header, tensors = encode(w)
    padding = payload_bits(tensors) - bits(w)
    assert 0 <= padding <= 7 * len(tensors), f"{bits(w)} bits counted, {payload_bits(tensors)} written"


def test_encoded_tensors_are_flat(w: Weight) -> None:
    header, tensors = encode(w)
    assert all(tensor.ndim == 1 and tensor.is_contiguous() for tensor in tensors.values())


def test_a_store_that_sorts_names_does_no_harm(w: Weight) -> None:
    """Config files are written with sorted keys."""
    header, tensors = encode(w)
    assert json.loads(json.dumps(header)) == header, "the header must survive JSON unchanged"
    header = json.loads(json.dumps(header, sort_keys=True))
    assert torch.equal(dense(decode(header, dict(sorted(tensors.items())))), dense(w))


def test_matmul_is_the_product_with_the_dense_matrix(w: Weight) -> None:
    x = inputs(w).double()
    expected = x @ dense(w).double().T
    scale = max(1.0, float(expected.abs().max()))
    assert (matmul(x, w) - expected).abs().max() <= 1e-4 * scale  # low-rank and rotated parts round in float32
    assert (matmul(x.float(), w).double() - expected).abs().max() <= 1e-4 * scale


def test_matmul_takes_any_leading_shape_and_keeps_the_dtype(w: Weight) -> None:
    x = inputs(w, rows=6)
    flat = matmul(x, w)
    assert torch.allclose(matmul(x.reshape(2, 3, -1), w).reshape(6, -1), flat, rtol=1e-5, atol=1e-5)
    assert matmul(x.bfloat16(), w).dtype == torch.bfloat16


def test_decoded_multiplies_to_the_same(w: Weight) -> None:
    x = inputs(w)
    again, expected = decoded(w), matmul(x, w)
    assert shape(again) == shape(w)
    if "rotated" in describe(w) or "scaled" in describe(w):  # decoding changes the matrix instead of the inputs
        assert (matmul(x, again) - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
        return
    assert torch.equal(matmul(x, again), expected)
    assert torch.equal(matmul(x.bfloat16(), again), matmul(x.bfloat16(), w))


def test_dense_is_float32_of_the_stated_shape_and_repeatable(w: Weight) -> None:
    value = dense(w)
    assert value.dtype == torch.float32 and tuple(value.shape) == shape(w) and bool(value.isfinite().all())
    assert torch.equal(value, dense(w))


def test_nothing_is_edited_in_place(w: Weight) -> None:
    before = {name: tensor.clone() for name, tensor in encode(w)[1].items()}
    for question in (dense, decoded, bits, describe, encode):
        question(w)
    matmul(inputs(w), w)
    after = encode(w)[1]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"{changed} changed while the weight was only read"


# --- what single nodes stand for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("levels", [2, 3, 8, 256])
def test_a_grid_is_code_minus_zero_times_scale_with_a_ragged_last_group(levels: int, symmetric: bool) -> None:
    w = grid((3, 10), levels, 4, 1, symmetric)
    assert w.scale.shape == (3, 3), "two groups of four and one of two"
    for row in range(3):
        for column in range(10):
            group = column // 4
            zero = (levels - 1) / 2 if w.zero is None else float(w.zero[row, group])
            expected = (float(w.codes[row, column]) - zero) * float(w.scale[row, group])
            assert float(dense(w)[row, column]) == pytest.approx(expected, rel=1e-6)


def test_ragged_groups_pay_for_their_own_scale() -> None:
    assert bits(grid((4, 33), 8, 16, 0, True)) == 4 * 33 * 3 + 4 * 3 * 16
    assert bits(grid((4, 33), 8, 16, 0, False)) == 4 * 33 * 3 + 4 * 3 * (16 + 3)


def test_where_selects_element_by_element_and_stores_each_once() -> None:
    size = (6, 16)
    inside = torch.rand(size, generator=seeded(0)) < 0.25
    a, b = Dense(torch.randn(size)), Dense(torch.randn(size).bfloat16())
    w = Where(Bitmap(inside), a, b)
    assert torch.equal(dense(w), torch.where(inside, a.values, b.values.float()))
    assert bits(w) == inside.numel() + 32 * int(inside.sum()) + 16 * int((~inside).sum())
    by_column = Where(Columns(inside[0]), a, b)
    assert torch.equal(dense(by_column), torch.where(inside[0].expand(size), a.values, b.values.float()))
    assert bits(by_column) == 16 + 6 * (32 * int(inside[0].sum()) + 16 * int((~inside[0]).sum()))


def test_nested_selections_are_stored_only_where_both_show() -> None:
    size = (8, 8)
    outer, inner = torch.rand(size, generator=seeded(1)) < 0.5, torch.rand(size, generator=seeded(2)) < 0.5
    one = Dense(torch.ones(size))
    w = Where(Bitmap(outer), Where(Bitmap(inner), one, Zero(size)), Zero(size))
    assert bits(w) == 2 * 64 + 32 * int((outer & inner).sum())


def supported_patterns() -> list[tuple[int, int]]:
    return [(kept, group) for group in range(2, 17) for kept in range(1, group) if math.comb(group, kept) <= 256]


@pytest.mark.parametrize("kept, group", supported_patterns())
def test_every_pattern_that_a_byte_can_name(kept: int, group: int) -> None:
    size = (20, 3 * group)
    w = Where(pattern(size, kept, group, seed=kept), Dense(torch.randn(size)), Zero(size))
    header, tensors = encode(w)
    again = decode(header, tensors)
    assert isinstance(again, Where) and torch.equal(again.index.inside, w.index.inside)
    assert torch.equal(dense(again), dense(w))
    assert 0 <= payload_bits(tensors) - bits(w) <= 7 * len(tensors)
    names = 60 * math.ceil(math.log2(math.comb(group, kept)))
    assert bits(w) - 32 * 60 * kept <= names, "a pattern costs at most its number"


def test_a_pattern_with_more_choices_than_a_byte_is_refused() -> None:
    size = (2, 12)
    with pytest.raises(ValueError, match="at most 256"):
        encode(Where(pattern(size, 6, 12, 0), Dense(torch.randn(size)), Zero(size)))


def test_describe_names_the_parts() -> None:
    size = (4, 8)
    w = Sum(
        (
            Where(pattern(size, 2, 4, 0), grid(size, 8, 8, 0, True), Zero(size)),
            LowRank(Dense(torch.ones(4, 2)), Dense(torch.ones(2, 8))),
        )
    )
    text = describe(RotatedInputs(w, torch.ones(8, dtype=torch.bool), 8))
    assert all(part in text for part in ("rotated 8", "2:4", "3-bit", "zero", "rank 2")), text


# --- a node or index that a recursion forgot ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unheard:
    inside: Tensor


@pytest.mark.parametrize("question", [shape, dense, bits, describe, decoded])
def test_an_unknown_node_fails_loudly(question: Callable[[Weight], object]) -> None:
    unknown: Any = Unheard(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="Unheard"):
        question(unknown)
    with pytest.raises(TypeError, match="Unheard"):
        matmul(torch.ones(1, 2), unknown)
    with pytest.raises(TypeError, match="Unheard"):
        encode(unknown)
    with pytest.raises(TypeError, match="Unheard"):
        encode(Where(unknown, Zero((2, 2)), Zero((2, 2))))


def test_an_unknown_header_fails_loudly() -> None:
    with pytest.raises(TypeError, match="hologram"):
        decode({"node": "hologram"}, {})
    header = {"node": "where", "shape": [2, 2], "index": {"kind": "dice"}}
    with pytest.raises(TypeError, match="dice"):
        decode(header, {"index": torch.zeros(1, dtype=torch.uint8)})


# --- rotation -------------------------------------------------------------------------------------------------------

WIDTHS = ((1, 1), (2, 2), (8, 8), (24, 8), (33, 1), (48, 16), (64, 64), (12, 2))


def rotation_matrix(signs: Tensor, block: int) -> Tensor:
    """R of `rotate(x) = x @ R` in float64, entry by entry: Sylvester's H[i, j] = (-1)^popcount(i & j)."""
    width = len(signs)
    apart = width // block
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for i in range(block):
        for j in range(block):
            for offset in range(apart):
                row = i * apart + offset
                entry = (-1) ** (i & j).bit_count() * (1.0 if signs[row] else -1.0)
                matrix[row, j * apart + offset] = entry / math.sqrt(block)
    return matrix


@pytest.mark.parametrize("width, block", WIDTHS)
def test_rotate_is_the_explicit_hadamard_matrix(width: int, block: int) -> None:
    signs = torch.rand(width, generator=seeded(width)) < 0.5
    matrix = rotation_matrix(signs, block)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    x = torch.randn(5, width, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(rotate(x, signs, block), x @ matrix)
    torch.testing.assert_close(unrotate(x, signs, block), x @ matrix.T)


@pytest.mark.parametrize("width, block", WIDTHS)
def test_unrotate_undoes_rotate(width: int, block: int) -> None:
    signs = torch.rand(width, generator=seeded(width)) < 0.5
    x = torch.randn(2, 3, width, generator=seeded(1))
    torch.testing.assert_close(unrotate(rotate(x, signs, block), signs, block), x)
    torch.testing.assert_close(rotate(unrotate(x, signs, block), signs, block), x)
    torch.testing.assert_close(rotate(x, signs, block).norm(dim=-1), x.norm(dim=-1))


def test_long_matrices_are_turned_back_in_the_memory_that_nobody_else_reads() -> None:
    rows, signs = ROWS + 3, torch.rand(8, generator=seeded(2)) < 0.5
    values = torch.randn(rows, 8, generator=seeded(1))
    before, matrix = values.clone(), rotation_matrix(signs, 8).float()
    codes = torch.randint(0, 16, (rows, 8), dtype=torch.uint8, generator=seeded(3))
    stored = RotatedInputs(Grid(codes, torch.ones(rows, 1).half(), None, 16, 8), signs, 8)
    for _ in range(2):
        torch.testing.assert_close(dense(stored), (codes.float() - 7.5) @ matrix.T)
    torch.testing.assert_close(dense(RotatedInputs(Dense(values), signs, 8)), before @ matrix.T)
    assert torch.equal(values, before)  # `dense` of numbers as they are is their own memory


def test_rotation_spreads_a_spike_over_the_whole_width() -> None:
    spike = torch.zeros(64)
    spike[5] = 1.0
    assert torch.allclose(rotate(spike, torch.ones(64, dtype=torch.bool), 64).abs(), torch.full((64,), 1 / 8))


def test_a_rotated_weight_sees_rotated_inputs() -> None:
    signs = torch.rand(24, generator=seeded(0)) < 0.5
    matrix = torch.randn(5, 24, generator=seeded(1))
    w = RotatedInputs(Dense(rotate(matrix, signs, 8)), signs, 8)
    torch.testing.assert_close(dense(w), matrix)
    x = torch.randn(3, 24, generator=seeded(2))
    torch.testing.assert_close(matmul(x, w), x @ matrix.T)
