"""Scales of keys and values for vLLM: those of transformers' own cache, in the files that vLLM reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import llmcompress as lc
from llmcompress.compression.job import prepare
from llmcompress.compression.run_files import BlockEntry
from llmcompress.errors import RecipeError
from llmcompress.formats.export import export
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.reading import read_json
from llmcompress.pipeline.engines import plan_for
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.modules import compressed_linears
from tests.formats.vllm_answers import our_scores, vllm_scores
from tests.tiny import save_tiny
from tests.zoo import save_zoo

TEXT = {"dataset": "stdlib", "samples": 6, "length": 32, "held_out": 2}
RULE = {"match": "*", "steps": [{"method": "mxfp", "format": "fp8"}], "inputs": {"format": "fp8"}}
ASKED: dict[str, Any] = {"version": 1, "rules": [RULE], "calibration": TEXT, "kv_cache": "fp8"} | {
    "prefix": "dense",
    "compute": "float32",
}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("dense") / "model", **SIZES, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lc.compress(source, ASKED, tmp_path_factory.mktemp("ours") / "out").folder


def test_scales_are_of_the_largest_keys_and_values(source: Path, ours: Path) -> None:
    """As transformers caches them in the dense model, over the calibration text without what is held out."""
    tokens = prepare(resolve(source), read_recipe(ASKED)).tokens
    assert tokens is not None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens.sequences[: -tokens.held_out], past_key_values=past)
    wanted = {
        f"model.layers.{number}.self_attn": [float(kept.abs().max()) / 448 for kept in (layer.keys, layer.values)]
        for number, layer in enumerate(past.layers)
    }
    found = lc.read(ours).kv_scales
    assert found.keys() == wanted.keys()
    assert all(found[path] == pytest.approx(wanted[path], rel=1e-4) for path in wanted)
    entry = BlockEntry(kv_scales=found)
    stored = json.loads(json.dumps(entry.to_json()))
    assert BlockEntry.from_json(stored).kv_scales == found
    del stored["peak"], stored["phases"]  # as an earlier version wrote it
    assert BlockEntry.from_json(stored).to_json() == entry.to_json()


def test_scales_are_of_values_whose_channels_were_scaled(tmp_path: Path) -> None:
    """AWQ moves scales of the output projection's inputs into the values; 8 bits change them little."""
    place = save_tiny("qwen3", tmp_path / "dense", **SIZES, tie_word_embeddings=False)
    weights = load_file(place / "model.safetensors")
    uneven = torch.logspace(0, 2, 64)[:, None]
    save_file({name: w * uneven if "v_proj" in name else w for name, w in weights.items()}, place / "model.safetensors")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 8, "group_size": 32}]}]
    recipe = ASKED | {"rules": rules, "fuse": {"awq": True}}
    result = lc.compress(place, recipe, tmp_path / "out")
    assert any("o_proj: channels scaled by" in note and "exponent 0," not in note for note in result.report.fused)
    tokens = prepare(resolve(place), read_recipe(recipe)).tokens
    assert tokens is not None
    model = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens.sequences[: -tokens.held_out], past_key_values=past)
    for number, layer in enumerate(past.layers):
        _, values = result.report.kv_scales[f"model.layers.{number}.self_attn"]
        assert values == pytest.approx(float(layer.values.abs().max()) / 448, rel=0.05)


def test_blocks_without_attention_have_no_scales(tmp_path: Path) -> None:
    source = save_zoo("lfm2", tmp_path / "dense")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 8}]}]
    report = lc.compress(source, ASKED | {"rules": rules}, tmp_path / "out").report
    kinds = resolve(source).config.layer_types
    assert {path.split(".")[2] for path in report.kv_scales} == {
        str(number) for number, kind in enumerate(kinds) if kind == "full_attention"
    }
    assert 0 < len(report.kv_scales) < len(kinds)


@pytest.mark.parametrize(
    ("family", "count"), [("falcon", 2), ("gptj", 2), ("mpt", 2), ("codegen", 2), ("minimax", 1), ("llama4_text", 2)]
)
def test_attention_has_scales_however_it_calls_its_cache(family: str, count: int, tmp_path: Path) -> None:
    source = save_zoo(family, tmp_path / "dense")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 8}]}]
    assert len(lc.compress(source, ASKED | {"rules": rules}, tmp_path / "out").report.kv_scales) == count


def test_scales_of_the_cache_do_not_change_those_of_channels(source: Path, tmp_path: Path) -> None:
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 32}]}]
    asked = ASKED | {"rules": rules, "fuse": {"awq": True}}
    with_cache, without = (
        lc.compress(source, asked | {"kv_cache": cache}, tmp_path / str(cache)) for cache in ("fp8", None)
    )
    assert with_cache.report.fused == without.report.fused
    one, other = (load_file(result.folder / "model.safetensors") for result in (with_cache, without))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_folder_for_vllm_has_the_scales(ours: Path, tmp_path: Path) -> None:
    export(ours, tmp_path / "out", "compressed-tensors")
    stored, scales = load_file(tmp_path / "out" / "model.safetensors"), lc.read(ours).kv_scales
    assert float(stored["model.layers.1.self_attn.v_scale"]) == pytest.approx(scales["model.layers.1.self_attn"][1])
    scheme = read_json(tmp_path / "out" / "config.json")["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"], scheme["dynamic"]) == (8, "float", "tensor", False)
    read = load_model(locate(str(tmp_path / "out")))
    for name, linear in compressed_linears(AutoModelForCausalLM.from_pretrained(ours)).items():
        x = torch.randn(9, linear.in_features, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(read.get_submodule(name)(x), linear(x), rtol=1e-2, atol=1e-2)
    assert any(note.startswith("kv_cache: 2 of 2 blocks have scales") for note in lc.read(ours).warnings)
    assert export(ours, tmp_path / "dense", "dense").changed[-2] == "scales of keys and values are left out"


def test_other_engines_and_no_text_are_refused(source: Path) -> None:
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}]
    with pytest.raises(RecipeError, match=r"kv_cache: llama.cpp reads no scales .*; leave kv_cache: out"):
        plan_for("llama.cpp", source, read_recipe({**ASKED, "rules": rules}))
    with pytest.raises(RecipeError, match="kv_cache requires calibration; add it to the recipe, or leave kv_cache out"):
        lc.plan(source, {"version": 1, "rules": rules, "kv_cache": "fp8"})


@pytest.mark.slow
def test_vllm_keeps_keys_and_values_by_the_scales(ours: Path, tmp_path: Path) -> None:
    """Its answers stay, and do not where the scales in the file are too small."""
    for name, factor, least, most in (("right", 1.0, 0.0, 0.1), ("small", 0.01, 0.2, 10.0)):
        folder = tmp_path / name / "out"
        export(ours, folder, "compressed-tensors")
        stored = load_file(folder / "model.safetensors")
        scaled = {
            key: value * factor if key.endswith(("k_scale", "v_scale")) else value for key, value in stored.items()
        }
        save_file(scaled, folder / "model.safetensors", {"format": "pt"})
        distance = (vllm_scores(folder) - our_scores(ours)).abs().mean()
        assert least <= distance < most, name
