"""Floats of few bits have the values and the bits of the specification; other formats refuse them in a sentence."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.gguf.tensor_types import exact_type
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.expression import bits, dense, describe, float_values
from llmcompress.weight.nodes import Minifloat
from llmcompress.weight.runtime_formats import compressed_tensors_obstacle
from llmcompress.weight.trainable.relax import KINDS, Relaxation, relax
from tests.builders import FLOATS, SCALES, minifloat, random_nestings


def test_four_bit_floats_are_those_of_the_table() -> None:
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert float_values("e2m1").tolist() == [*numbers, *(-number for number in numbers)]


def test_eight_bit_floats_are_those_of_torch() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(float_values("e4m3"), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form, smallest, largest", [("e2m3", 0.125, 7.5), ("e3m2", 0.0625, 28.0)])
def test_six_bit_floats_reach_from_their_smallest_to_their_largest(form: str, smallest: float, largest: float) -> None:
    numbers = float_values(form)  # type: ignore[arg-type]
    assert len(numbers) == 64 and numbers[1] == smallest and numbers[31] == largest
    assert bool((numbers[:32].diff() > 0).all()) and torch.equal(numbers[32:], -numbers[:32])


def test_scales_without_a_mantissa_are_powers_of_two() -> None:
    powers = float_values("e8m0")
    assert (
        all(float(powers[code]) == 2.0 ** (code - 127) for code in (0, 1, 126, 127, 128, 254)) and powers[255].isnan()
    )


def test_each_weight_is_its_number_times_its_scales() -> None:
    w = minifloat((3, 21), "e2m1", "e4m3", 16, 0)
    assert w.scale.shape == (3, 2) and w.tensor_scale is not None
    for row in range(3):
        for column in range(21):
            number = float_values("e2m1")[int(w.codes[row, column])]
            scale = float_values("e4m3")[int(w.scale[row, column // 16])] * w.tensor_scale[0]
            assert dense(w)[row, column] == number * scale


def test_all_rows_may_share_a_bfloat16_scale() -> None:
    w = minifloat((3, 21), "e4m3", "bfloat16", 21, 0, of_all=True)
    assert torch.equal(dense(w), float_values("e4m3")[w.codes.long()] * w.scale.float().item())
    assert describe(w) == "e4m3 floats row of all rows, scales bfloat16" and bits(w) == 8 * 3 * 21 + 16


def test_bits_are_those_of_the_formats() -> None:
    size = (64, 128)
    assert bits(minifloat(size, "e2m1", "e8m0", 32, 0)) == 64 * 128 * 4.25  # MXFP4
    assert bits(minifloat(size, "e2m3", "e8m0", 32, 0)) == 64 * 128 * 6.25  # MXFP6
    assert bits(minifloat(size, "e4m3", "e8m0", 32, 0)) == 64 * 128 * 8.25  # MXFP8
    assert bits(minifloat(size, "e2m1", "e4m3", 16, 0)) == 64 * 128 * 4.5 + 32  # NVFP4
    assert bits(minifloat(size, "e4m3", "bfloat16", 128, 0)) == 64 * 128 * 8 + 64 * 16  # FP8


@pytest.mark.parametrize("form", FLOATS)
def test_decode_gives_back_every_field(form: str) -> None:
    for scales, of_all in itertools.product(SCALES, (False, True)):
        w = minifloat((7, 33), form, scales, 16, 3, of_all)  # type: ignore[arg-type]
        again = decode(*encode(w))
        assert isinstance(again, Minifloat) and again.codes.dtype == torch.uint8 and again.scale.dtype == w.scale.dtype
        assert torch.equal(again.codes, w.codes) and torch.equal(again.scale, w.scale)
        assert (again.form, again.scales, again.group_size) == (w.form, w.scales, w.group_size)
        assert (again.tensor_scale is None) == (scales != "e4m3")
        assert w.tensor_scale is None or torch.equal(again.tensor_scale, w.tensor_scale)  # type: ignore[arg-type]


def test_minifloats_do_not_train() -> None:
    w = minifloat((7, 33), "e2m1", "e4m3", 16, 3)
    relaxed = relax(w, Relaxation(frozenset(KINDS)), dense(w) + 1)
    assert relaxed.kinds() == {} and torch.equal(relaxed.weight(), dense(w))


def test_formats_without_minifloats_refuse_them() -> None:
    w = minifloat((7, 33), "e2m1", "e8m0", 32, 3)
    assert describe(w) == "e2m1 floats g32, scales e8m0"
    with pytest.raises(UnfitError, match="e2m1 floats g32, scales e8m0 does not fill blocks of 32 columns"):
        exact_type(w)
    assert compressed_tensors_obstacle(w) == "groups of 32 do not divide the width 33"


def test_random_nestings_contain_minifloats() -> None:
    assert '"minifloat"' in json.dumps([encode(w)[0] for w in random_nestings(0, 60)])
