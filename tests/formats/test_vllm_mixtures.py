"""Mixtures of experts for vLLM: names, patterns and routers as its loader reads them, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.allocation import target_formats
from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.export import export
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.files.reading import read_json
from llmcompress.pipeline.engines import plan_for
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.modules import compressed_linears
from tests.formats.vllm_answers import our_scores, vllm_scores
from tests.zoo import save_zoo

IDS = torch.arange(30)[None] * 7 % 256
GRID = {"method": "rtn", "bits": 4, "group_size": 32, "narrow_range": True}
BYTES = {"method": "rtn", "bits": 8, "narrow_range": True}
FP8 = {"method": "mxfp", "format": "fp8"}
NVFP4 = {"method": "mxfp", "format": "nvfp4"}
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
REST = {"match": "*", "steps": [GRID]}
EXPERTS = "*.experts.*"


def save_mixture(family: str, place: Path) -> Path:
    """Save a tiny mixture whose routers choose clearly: in bfloat16, close choices would turn out otherwise."""
    save_zoo(family, place, **SIZES, **({"moe_intermediate_size": 128} if family == "qwen3_moe" else {}))
    model = AutoModelForCausalLM.from_pretrained(place)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= 20
    model.save_pretrained(place)
    return place


def exported(family: str, place: Path, rules: list[dict[str, Any]]) -> Path:
    source = save_mixture(family, place / "dense")
    folder = lc.compress(source, {"version": 1, "rules": rules}, place / "ours").folder
    export(folder, place / "out", "compressed-tensors")
    return place / "out"


@pytest.mark.parametrize(
    "family, path, leaves",
    [
        ("mixtral", "block_sparse_moe", ["w1", "w2", "w3"]),
        ("qwen3_moe", "mlp", ["down_proj", "gate_proj", "up_proj"]),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_have_the_names_of_the_hub(family: str, path: str, leaves: list[str], tmp_path: Path) -> None:
    folder = exported(family, tmp_path, [REST])
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    start = f"model.layers.0.{path}"
    assert {f"{start}.experts.3.{leaf}.weight_packed" for leaf in leaves} < stored
    assert f"{start}.gate.weight" in stored and not any("mlp.gate.weight_packed" in name for name in stored)
    config = read_json(folder / "config.json")["quantization_config"]
    [group] = config["config_groups"].values()
    assert f"re:model\\.layers\\.1\\.{path}\\.experts[.].*" in group["targets"] and len(group["targets"]) == 10
    assert f"{start}.gate" in config["ignore"]


@pytest.mark.parametrize(
    "rule",
    [
        {"steps": [GRID]},
        {"steps": [BYTES], "inputs": {"format": "int8"}},
        {"steps": [FP8], "inputs": {"format": "fp8"}},
        {"steps": [NVFP4]},
        {"steps": []},
    ],
    ids=["4 bits", "int8", "fp8", "nvfp4", "dense"],
)
def test_what_is_read_back_answers_as_ours(rule: dict[str, Any], tmp_path: Path) -> None:
    """`eval` of the folder scores the same numbers, and rounds inputs of experts, which transformers does not load."""
    folder = exported("mixtral", tmp_path, [{"match": EXPERTS, **rule}, REST])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    read = load_model(locate(str(folder)))
    with torch.no_grad():
        for name, linear in compressed_linears(ours).items():
            x = torch.randn(9, linear.in_features, generator=torch.Generator().manual_seed(1))
            found, wanted = read.get_submodule(name)(x), linear(x)
            assert (found - wanted).norm() < 5e-3 * wanted.norm(), name  # scales of integers are bfloat16 there
        found, wanted = (model(IDS).logits for model in (read, ours))
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_experts_of_a_block_have_one_form(tmp_path: Path) -> None:
    source = save_mixture("mixtral", tmp_path / "dense")
    rules = [{"match": "*.experts.*.down_proj", "steps": [BYTES]}, REST]
    recipe = read_recipe({"version": 1, "rules": rules})
    with pytest.raises(
        RecipeError, match="vllm holds all experts of a block in one type, and .* 3.91-bit g32 and 7.99-bit row"
    ):
        plan_for("vllm", source, recipe)
    folder = lc.compress(source, recipe, tmp_path / "ours").folder
    with pytest.raises(
        InputError, match="model.layers.0.mlp.experts holds its experts in several forms, and vLLM reads one"
    ):
        export(folder, tmp_path / "out", "compressed-tensors")
    with pytest.raises(RecipeError, match="a target would choose for each .* give experts a rule"):
        plan_for("vllm", source, read_recipe({"version": 1, "target": {"bpw": 4.5}, "calibration": {"held_out": 2}}))


@pytest.mark.parametrize(
    "rule, why",
    [
        ({"steps": [FP8]}, "vLLM rounds what fp8 matrices of experts multiply, too"),
        ({"steps": [BYTES], "inputs": {"format": "int8", "scale": "tensor"}}, "takes one scale for the inputs of all"),
        (
            {"steps": [{"method": "mxfp", "format": "fp8_tensor"}], "inputs": {"format": "fp8"}},
            "rounds an expert's fp8",
        ),
    ],
    ids=["fp8 alone", "scale: tensor", "fp8_tensor"],
)
def test_experts_that_vllm_lacks_are_refused_by_plan(rule: dict[str, Any], why: str, tmp_path: Path) -> None:
    source = save_mixture("qwen3_moe", tmp_path / "dense")
    recipe = read_recipe({"version": 1, "rules": [{"match": EXPERTS, **rule}, REST], "calibration": {}})
    with pytest.raises(RecipeError, match=f"experts.0.gate_proj is a matrix of an expert: .*{why}"):
        plan_for("vllm", source, recipe)


def test_matrices_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's experts are held against each other, so no gate of one against its up again."""
    source, seen = save_mixture("qwen3_moe", tmp_path / "dense"), Counter[str]()
    form_of = target_formats._form_of
    monkeypatch.setattr(target_formats, "_form_of", lambda job, it: (seen.update([it.name]), form_of(job, it))[1])
    plan_for("vllm", source, read_recipe({"version": 1, "rules": [REST]}))
    assert (
        set(seen.values()) == {1} and any("experts" in name for name in seen) and any("q_proj" in name for name in seen)
    )


def test_other_mixtures_are_refused(tmp_path: Path) -> None:
    source = save_zoo("gpt_oss", tmp_path / "dense")
    recipe = read_recipe({"version": 1, "rules": [REST]})
    with pytest.raises(InputError, match="is a mixture of experts .* which cannot go to compressed-tensors yet"):
        plan_for("vllm", source, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, rule, script",
    [
        ("mixtral", {"steps": []}, "vllm_engine.py"),
        ("qwen3_moe", {"steps": [GRID]}, "vllm_experts.py"),
        ("mixtral", {"steps": [BYTES], "inputs": {"format": "int8"}}, "vllm_experts.py"),
        ("mixtral", {"steps": [FP8], "inputs": {"format": "fp8"}}, "vllm_experts.py"),
    ],
    ids=["dense experts", "4 bits", "int8", "fp8"],
)
def test_vllms_engine_answers_as_ours(family: str, rule: dict[str, Any], script: str, tmp_path: Path) -> None:
    """With vLLM's kernels where experts are dense, else with its loader and router, and a loop over experts.

    The mean says it: in bfloat16 a router may still choose another expert for a token.
    """
    folder = exported(family, tmp_path, [{"match": EXPERTS, **rule}, REST])
    assert (vllm_scores(folder, script) - our_scores(tmp_path / "ours")).abs().mean() < 0.1
