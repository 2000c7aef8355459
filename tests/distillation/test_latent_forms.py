"""Learned rounding in other forms, while a model is compressed: blocks come nearer by codes alone, in the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmcompress as lc
from llmcompress.errors import RecipeError
from llmcompress.weight.modules import compressed_linears
from tests.distillation.test_reconstruct import block_errors, place, recipe

__all__ = ["place"]
RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16, "symmetric": False}]}]
OFFSETS = {"latents": "weights", "offsets": {"rank": 4}}
DIVIDED = {"latents": "divided"}
CBQ = OFFSETS | {"window": 2}


@pytest.mark.slow
@pytest.mark.parametrize("form", [DIVIDED, CBQ], ids=["divided", "cbq"])
def test_codes_learn_on_text_that_they_do_not_see(form: dict[str, Any], place: Path, tmp_path: Path) -> None:
    plain = lc.compress(place / "dense", recipe(place, None, rules=RULES), tmp_path / "plain")
    asked = recipe(place, {"rates": {"codes": 2e-2}} | form, rules=RULES)
    found = lc.compress(place / "dense", asked, tmp_path / "tuned")
    blocks = list(found.report.blocks.values())
    assert len(blocks) == 2 and all(block["step"] and block["after"] < block["before"] for block in blocks)
    after, before = block_errors(place, found.folder), block_errors(place, plain.folder)
    assert blocks[-1]["after"] == pytest.approx(after[-1], rel=1e-3) and after[-1] < 0.99 * before[-1]
    assert found.report.bpw == plain.report.bpw
    one, other = (compressed_linears(result.model) for result in (plain, found))
    moved = [name for name, layer in one.items() if not torch.equal(layer.W_q, other[name].W_q)]
    assert len(moved) > len(one) // 2 and all(layer.layout == other[name].layout for name, layer in one.items())


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"offsets": {"rank": 4}, "rates": {"scales": 1e-3}}, "add a rate for codes"),
        ({"latents": "divided", "rates": {"scales": 1e-3}}, "add a rate for codes"),
        (OFFSETS | DIVIDED | {"rates": {"codes": 1e-3}}, "leave one of them out"),
        (DIVIDED | {"rates": {"codes": 1e-3}, "freezing": {}}, "freezing holds single latents"),
        (OFFSETS | {"rates": {"codes": 1e-3}, "freezing": {}}, "freezing holds single latents"),
        ({"offsets": {"rank": 0}, "rates": {"codes": 1e-3}}, "offsets: rank is 0"),
        ({"window": 3}, "window is 3"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_impossible_latent_forms_are_refused(asked: dict[str, Any], sentence: str, place: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        lc.plan(place / "dense", recipe(place, asked))
