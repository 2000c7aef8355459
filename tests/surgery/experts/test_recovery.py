"""Results of saving experts are students like any other: distillation brings them closer to the original."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.models.dense.model import resolve
from tests.zoo import save_zoo, text_for_calibration

WAYS: dict[str, Any] = {
    "prune": partial(lc.prune_experts, keep=2),
    "merge": partial(lc.merge_experts, keep=2),
    "condense": partial(lc.condense_experts, count=1),
}
FAMILIES = ["qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss"]  # the last two store the experts of a block as one
CASES = [(way, family) for way in WAYS for family in (FAMILIES[:2] if way == "condense" else FAMILIES)]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "family"), CASES)
def test_a_dense_student_learns(way: str, family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    WAYS[way](tmp_path / "dense", tmp_path / "out", text=text, samples=4)
    data = {"dataset": text, "samples": 28, "length": 48, "held_out": 4}
    asked = {"version": 1, "data": data, "rates": {"weights": 2e-3}, "steps": 16, "batch": 4, "compute": "float32"}
    done = lc.distill(tmp_path / "out", tmp_path / "dense", asked, tmp_path / "mended")
    assert done.history[-1]["kl"] < 0.95 * done.history[0]["kl"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "mended", output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    before, after = (resolve(tmp_path / name) for name in ("out", "mended"))
    stayed = [name for name in after.tensors if after.read(name).equal(before.read(name))]
    assert not any(".experts." in name and name.endswith("_proj.weight") for name in stayed)
    protocol = lc.Protocol(text=Path(text), windows=2, length=48)
    dense = str(tmp_path / "dense")
    mended, damaged = (lc.score(str(tmp_path / name), protocol, against=dense)["kl"] for name in ("mended", "out"))
    assert mended < damaged
