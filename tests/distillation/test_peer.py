"""TRL's GKD trainer as an oracle: another loop, loss and LoRA, which learn the same from the same start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.recipe.distillation import Distillation
from tests.distillation.miniature import make, recipe

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]


@pytest.mark.slow
def test_a_distillation_matches_trl(tmp_path: Path) -> None:
    """The losses of all steps, and the written models, of low-rank terms under forward KL. Our terms are rounded to
    bfloat16 at every step, TRL's at the end."""
    from distillation import SAME, ours, peer

    place = make(tmp_path, RULES)
    more = {"adapt": {"rank": 2}, "rates": {"factors": 3e-2}, "steps": 12, "warmup": 0.4, "clip": 0.006}
    asked = Distillation.model_validate(recipe(place, **more))
    pair = str(place / "small"), str(place / "dense")
    mine, theirs = ours(*pair, asked, place / "ours"), peer(*pair, asked, place / "theirs")
    assert {key: mine[key] for key in SAME} == {key: theirs[key] for key in SAME}
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=3e-3)
    assert mine["losses"][-1] < 0.7 * mine["losses"][0]
    ids = torch.arange(24)[None] % 200
    with torch.no_grad():
        small, *found = (
            AutoModelForCausalLM.from_pretrained(place / name)(ids).logits for name in ("small", "ours", "theirs")
        )
    assert (found[0] - found[1]).norm() < 0.02 * (found[0] - small).norm()
