"""The residual stream rotated for good: the dense model must compute what it did, whatever its norms and its head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.calibration.blocks import load
from llmcompress.compression.rotation import rotated_source
from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import FAMILIES
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import RotatedInputs
from tests.tiny import VOCABULARY, save_tiny

FUSIBLE = [name for name, family in FAMILIES.items() if family.producers]
BIASES = {"attention_bias": True, "mlp_bias": True}
TEXT = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "


def loaded(source: DenseModel) -> PreTrainedModel:
    model = source.skeleton()
    load(model, "", source, torch.device("cpu"))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(40)[None] * 5 % VOCABULARY).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FUSIBLE)
def test_logits_stay(family: str, tied: bool, tmp_path: Path) -> None:
    source = resolve(str(save_tiny(family, tmp_path, tokenizer=False, tie_word_embeddings=tied)))
    turned = rotated_source(source, seed=0, untie=tied)
    torch.testing.assert_close(logits(loaded(turned)), logits(loaded(source)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(turned.read("model.embed_tokens.weight"), source.read("model.embed_tokens.weight"))


def test_biases_and_widths_that_are_no_power_of_two(tmp_path: Path) -> None:
    source = resolve(str(save_tiny("llama", tmp_path, tokenizer=False, hidden_size=24, **BIASES)))
    turned = rotated_source(source, seed=3, untie=False)
    torch.testing.assert_close(logits(loaded(turned)), logits(loaded(source)), rtol=1e-4, atol=1e-4)


def test_norms_are_ones_and_writers_keep_their_size(tmp_path: Path) -> None:
    """An orthogonal matrix cannot change the length of a column that is written to the stream."""
    source = resolve(str(save_tiny("llama", tmp_path, tokenizer=False)))
    turned = rotated_source(source, seed=0, untie=False)
    for name in source.tensors:
        if "norm" in name:
            assert torch.equal(turned.read(name), torch.ones_like(source.read(name)))
        if "down_proj" in name or "embed" in name:
            along = 0 if "down_proj" in name else 1
            torch.testing.assert_close(turned.read(name).norm(dim=along), source.read(name).norm(dim=along))


def test_outlying_channels_of_the_stream_are_gone(tmp_path: Path) -> None:
    """A channel a hundred times as loud as the others is what a rotation spreads."""
    folder = save_tiny("llama", tmp_path, tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data[:, 3] *= 100
    model.save_pretrained(folder)
    source = resolve(str(folder))

    def crest(table: Tensor) -> float:
        return float(table.abs().amax() / table.square().mean().sqrt())

    name = "model.embed_tokens.weight"
    assert crest(rotated_source(source, 0, untie=False).read(name)) < 0.5 * crest(source.read(name))


def test_what_opens_the_model_again_stays(tmp_path: Path) -> None:
    """The gates compare with the dense model at this place: an adapter may be merged into it, or a file hold it."""
    source = replace(resolve(save_tiny("llama", tmp_path / "dense")), trust_remote_code=True, adapter=tmp_path)
    source = replace(source, file=tmp_path / "model.gguf")
    assert rotated_source(source, 0, untie=True).place == source.place


def test_a_tied_head_is_untied_only_when_asked(tmp_path: Path) -> None:
    source = resolve(str(save_tiny("llama", tmp_path, tokenizer=False, tie_word_embeddings=True)))
    with pytest.raises(RecipeError, match="output head .* is its token table.* set untie: true .*0.0 MB"):
        rotated_source(source, 0, untie=False)
    turned = rotated_source(source, 0, untie=True)
    assert turned.parameters == source.parameters and turned.bytes == source.bytes
    assert "matrix of its own" in turned.notes[-1] and not source.notes


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    source = resolve(str(save_tiny(family, tmp_path, tokenizer=False)))
    with pytest.raises(RecipeError, match=f"nothing can be fused into model type '{family}', only into llama"):
        rotated_source(source, 0, untie=True)


def recipe(text: Path, **fuse: Any) -> dict[str, Any]:
    grid = {"method": "rtn", "bits": 8, "group_size": 8}
    rules = [
        {"match": ["*.o_proj", "*.down_proj"], "steps": [{"method": "rotate"}, grid]},
        {"match": "*", "steps": [grid]},
    ]
    calibration = {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}
    return {"version": 1, "name": "test", "calibration": calibration, "fuse": fuse, "rules": rules}


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_a_checkpoint_loads_and_computes_like_the_dense_model(tied: bool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    folder = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=tied)
    asked = recipe(text, rotation=True, untie=tied)
    asked |= {key: [{"method": "rtn", "bits": 8, "group_size": 8}] for key in ("embeddings", "head")} if tied else {}
    planned = lc.plan(folder, asked)
    result = lc.compress(folder, asked, tmp_path / "out")
    assert planned.bytes <= result.report.bytes < planned.bytes + 20_000  # headers
    assert any("matrix of its own" in warning for warning in result.report.warnings) == tied
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    turned = {name for name, layer in compressed_linears(result.model).items() if _is_turned(layer)}
    assert any("hidden states and adapters" in warning for warning in result.report.warnings)
    assert {name.rpartition(".")[2] for name in turned} == {"o_proj", "down_proj"}
    dense, found = logits(AutoModelForCausalLM.from_pretrained(folder)), logits(result.model)
    assert float((found - dense).norm() / dense.norm()) < 0.02


def _is_turned(layer: Any) -> bool:
    return isinstance(layer.expression(), RotatedInputs)
