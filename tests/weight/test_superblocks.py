"""Superblocks of llama.cpp's types by gguf's own reader, and their laws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.weight import superblocks as tables
from llmcompress.weight.expression import bits, dense, describe
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.nodes import Superblocks, shape
from llmcompress.weight.rows import rows
from llmcompress.weight.schema import check
from llmcompress.weight.superblocks import (
    LAYOUTS,
    SuperblockForm,
    pack_superblocks,
    superblock_table,
    unpack_superblocks,
    with_parity,
)
from tests.builders import payload_bits, superblocks

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")
BITS = {
    "IQ1_S": 1.5625,
    "IQ1_M": 1.75,
    "TQ2_0": 2.0625,
    "IQ2_XXS": 2.0625,
    "IQ2_XS": 2.3125,
    "IQ2_S": 2.5625,
    "IQ3_XXS": 3.0625,
    "IQ3_S": 3.4375,
}
every_form = pytest.mark.parametrize("form", get_args(SuperblockForm))


@every_form
def test_superblocks_are_what_gguf_reads(form: SuperblockForm) -> None:
    w = superblocks(form, 5, 3, 0)
    theirs = gguf.quants.dequantize(w.codes.numpy(), gguf.GGMLQuantizationType[form])
    assert shape(w) == (5, 768) and describe(w) == form
    assert torch.equal(dense(w), torch.from_numpy(theirs))


@every_form
def test_every_bit_has_one_place(form: SuperblockForm) -> None:
    w = superblocks(form, 4, 2, 1)
    numbers = unpack_superblocks(w.codes, form)
    assert torch.equal(pack_superblocks(numbers, form), w.codes)
    places = torch.cat([at.flatten() for at in tables._bits_of(form)])
    assert torch.equal(places.sort().values, torch.arange(8 * LAYOUTS[form].bytes))


@every_form
def test_sizes_are_those_of_the_type(form: SuperblockForm) -> None:
    w = superblocks(form, 4, 2, 2)
    layout, payload = pack_weight(w)
    assert (256, LAYOUTS[form].bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    assert bits(w) == payload_bits(layout.views(payload)) == BITS[form] * math.prod(shape(w))


@every_form
def test_rows_are_read_alone(form: SuperblockForm) -> None:
    layout, payload = pack_weight(superblocks(form, 6, 2, 3))
    chosen = torch.tensor([4, 0, 4])
    whole = dense(superblocks(form, 6, 2, 3))
    assert torch.equal(dense(rows(layout.header, layout.views(payload), chosen)), whole[chosen])


def test_tall_matrices_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = superblocks("IQ3_S", 7, 2, 4)
    whole = dense(w)
    monkeypatch.setattr(tables, "PART", 1024)
    assert torch.equal(dense(w), whole)


def test_an_even_number_of_eight_signs_is_negative() -> None:
    masks = with_parity(torch.arange(128, dtype=torch.int32))
    assert [int(mask) & 127 for mask in masks] == list(range(128))
    assert all(int(mask).bit_count() % 2 == 0 for mask in masks)


def test_all_four_codes_of_tq2_0_are_numbers() -> None:
    numbers = unpack_superblocks(superblocks("TQ2_0", 1, 1, 5).codes, "TQ2_0")
    places = (torch.arange(256) % 4).int().view_as(numbers.places)
    found = replace(numbers, d=torch.ones_like(numbers.d), places=places)
    w = Superblocks(pack_superblocks(found, "TQ2_0"), "TQ2_0")
    assert dense(w)[0, :4].tolist() == [-1, 0, 1, 2]


def test_a_damaged_layout_is_refused() -> None:
    layout, _ = pack_weight(superblocks("IQ2_S", 4, 2, 6))
    good = layout.to_json()
    check(good)
    for change, reason in (({"shape": [4, 500]}, "256 columns do not divide"), ({"form": "IQ2_XS"}, "elements where")):
        with pytest.raises(ValueError, match=reason):
            check(good | {"header": layout.header | change})
    with pytest.raises(ValueError, match="form"):
        check(good | {"header": layout.header | {"form": "IQ9_S"}})


def test_without_the_package_gguf_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="the table of IQ2_S is in the package gguf; run pip install"):
        superblock_table.__wrapped__("IQ2_S")  # type: ignore[attr-defined]  # past the cache
