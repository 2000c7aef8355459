"""Compressing without calibration: the recipe for it, what a run says, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import RecipeError
from llmcompress.formats.hub import _card, _proof
from llmcompress.recipe.read import read_recipe
from tests.rules.source_tree import ROOT
from tests.tiers import tiered
from tests.tiny import save_tiny

CONFIGS = ROOT / "configs"


def recipe(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": "*", "steps": list(steps)}], **more}


@pytest.mark.parametrize("tied", tiered([True, False], bool))
@pytest.mark.parametrize(("name", "place"), [("recommended/data-free", 1), ("methods/data-free-presumed", 2)])
def test_the_data_free_recipe_needs_a_model_and_nothing_else(name: str, place: int, tied: bool, tmp_path: Path) -> None:
    """Of tied and of untied models: a table that is only looked up has no inputs to learn from either."""
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=tied, hidden_size=64, intermediate_size=128)
    fast = [f"rules[{rule}].steps[{place}].memory=10" for rule in range(3)]
    quick = read_recipe(CONFIGS / f"{name}.yaml", [*fast, "embeddings[1].memory=10"])
    report = lc.compress(source, quick, tmp_path / "out").report
    assert all(0 < row.error < 0.05 and row.error_heldout is None for row in report.layers)
    assert any(row.name.endswith("embed_tokens") for row in report.layers)
    assert report.gates is not None and report.gates.unmeasured, "nothing to judge by"
    if report.calibration is None:
        assert any("without calibration" in warning and "trellis" in warning for warning in report.warnings)
    else:
        assert report.calibration["source"] == "random tokens (seed 0)" and not report.calibration["held_out"]
        card = _card(tmp_path / "out", "me/small", _proof(tmp_path / "out"))["README.md"].decode()
        assert "tokens of `random tokens (seed 0)`, no text." in card
    ids = torch.arange(20)[None]
    with torch.no_grad():
        dense, ours = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, tmp_path / "out"))
    assert float((ours - dense).square().sum() / dense.square().sum()) < 0.2


def test_no_text_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr("llmcompress.compression.job.calibration_tokens", refuse)
    source = save_tiny("llama", tmp_path / "dense", tokenizer=False)
    for steps in ([{"method": "hqq", "bits": 3, "group_size": 16}], [{"method": "dimap", "sparsity": 0.5}]):
        lc.compress(source, recipe(*steps), tmp_path / steps[0]["method"])


def test_the_command_says_that_errors_are_those_of_the_weights(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    path = tmp_path / "hqq.yaml"
    path.write_text("version: 1\nrules:\n  - match: '*'\n    steps: [{method: hqq, bits: 4}]\n")
    done = CliRunner().invoke(app, ["compress", str(source), str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and "data    none: errors are those of the weights" in done.output


def test_a_method_that_learns_from_data_names_the_ways_out(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RecipeError) as refused:
        lc.plan(source, recipe({"method": "gptq", "bits": 3}))
    sentence = str(refused.value)
    assert sentence.startswith("gptq requires calibration; add it to the recipe") and "\n" not in sentence
    assert all(name in sentence for name in ("builtin", "self", "rtn", "hqq", "trellis"))
    assert "wanda" not in sentence


def test_what_follows_a_presumption_needs_no_calibration(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    presume, gptq = {"method": "presume"}, {"method": "gptq", "bits": 4, "group_size": 16}
    report = lc.compress(source, recipe(presume, gptq, {"method": "eora", "rank": 2}), tmp_path / "out").report
    assert report.calibration is None and all(0 < row.error < 0.1 for row in report.layers)
    assert any("without calibration, eora, gptq can use only the weights" in warning for warning in report.warnings)
    with pytest.raises(RecipeError, match="^gptq requires calibration; "):
        lc.plan(source, recipe(gptq, presume))


def test_aiming_at_dense_outputs_needs_data(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RecipeError, match="^asymmetric requires calibration; "):
        lc.plan(source, recipe({"method": "rtn"}, asymmetric=0.25))


def test_a_target_needs_held_out_text() -> None:
    with pytest.raises(RecipeError, match="options are judged on held-out text"):
        read_recipe({"version": 1, "target": {"bpw": 3}})
