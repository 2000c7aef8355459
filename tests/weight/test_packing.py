"""Packing: what goes in comes out, in as many bits as promised."""

import pytest
import torch

from llmcompress.weight.packing import (
    digits_per_byte,
    ones_before,
    pack,
    packed_bits,
    stream_bits,
    unpack,
    unpack_at,
    unpack_rows,
)
from tests.builders import seeded

LEVELS = range(2, 257)
COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1001)


def test_unpack_undoes_pack() -> None:
    for levels in LEVELS:
        codes = torch.randint(levels, (max(COUNTS),), generator=seeded(levels), dtype=torch.uint8)
        codes[:2] = torch.tensor([levels - 1, 0])
        for count in COUNTS:
            packed = pack(codes[:count], levels)
            assert packed.dtype == torch.uint8 and packed.ndim == 1
            assert torch.equal(unpack(packed, levels, count), codes[:count]), f"{count} codes of {levels} levels"


def test_packed_bits_are_the_bytes_up_to_the_last() -> None:
    for levels in LEVELS:
        for count in COUNTS:
            written = 8 * pack(torch.zeros(count, dtype=torch.uint8), levels).numel()
            assert 0 <= written - packed_bits(levels, count) <= 7, f"{count} codes of {levels} levels"


def test_a_byte_holds_its_digits_and_no_layout_is_wasteful() -> None:
    for levels in LEVELS:
        fitting = max(k for k in range(1, 9) if levels**k <= 256)
        smaller = fitting * stream_bits(levels) > 8  # else the bit stream, whose last byte alone is padded
        assert digits_per_byte(levels) == (fitting if smaller else 0), f"{levels} levels"
        best = min(stream_bits(levels), 8 / fitting)
        assert packed_bits(levels, 840) == pytest.approx(840 * best), f"{levels} levels: not the smaller layout"


def test_known_sizes() -> None:
    assert packed_bits(3, 1000) == 1600  # five ternary digits a byte
    assert packed_bits(6, 300) == 800  # three 2:4 patterns a byte
    assert [packed_bits(2**b, 64) for b in range(1, 9)] == [64 * b for b in range(1, 9)]


def test_lowest_bits_come_first() -> None:
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 4).tolist() == [0b00_11_10_01]
    assert pack(torch.tensor([5, 2, 7], dtype=torch.uint8), 8).tolist() == [0b11_010_101, 0b1]
    assert pack(torch.tensor([2, 0, 1], dtype=torch.uint8), 3).tolist() == [2 + 0 * 3 + 1 * 9]


def test_any_shape_is_packed_in_row_order() -> None:
    codes = torch.randint(5, (3, 7), generator=seeded(0), dtype=torch.uint8)
    assert torch.equal(pack(codes, 5), pack(codes.reshape(-1), 5))
    assert torch.equal(pack(codes.T, 5), pack(codes.T.contiguous().reshape(-1), 5)), "a view must be read by value"


@pytest.mark.parametrize("levels", [2, 3, 6, 200])
def test_a_code_out_of_range_is_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=rf"codes 0\.\.{levels} do not fit in {levels} levels"):
        pack(torch.tensor([0, levels], dtype=torch.uint8), levels)
    with pytest.raises(ValueError, match=f"codes -1..0 do not fit in {levels} levels"):
        pack(torch.tensor([0, -1]), levels)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 8, 16, 100, 256])
@pytest.mark.parametrize("width", [1, 5, 8, 24, 33])
def test_rows_are_read_from_their_own_bytes(levels: int, width: int) -> None:
    codes = torch.randint(levels, (13, width), generator=torch.Generator().manual_seed(levels), dtype=torch.uint8)
    for chosen in (torch.tensor([12, 0, 7, 7, 1]), torch.tensor([], dtype=torch.long)):
        assert torch.equal(unpack_rows(pack(codes, levels), levels, width, chosen), codes[chosen])


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 8, 16, 100, 256])
def test_codes_are_read_one_by_one(levels: int) -> None:
    codes = torch.randint(levels, (41,), generator=torch.Generator().manual_seed(levels), dtype=torch.uint8)
    places = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_at(pack(codes, levels), levels, places), codes[places])


@pytest.mark.parametrize("count", [1, 8, 43])
def test_set_bits_are_counted(count: int) -> None:
    ones = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.6
    places = torch.arange(count + 1)
    assert ones_before(pack(ones.to(torch.uint8), 2), places).tolist() == [
        int(ones[:n].sum()) for n in range(count + 1)
    ]
