"""Inputs of few bits in a run: what is gathered of them, what weights are fitted to, what the checkpoint does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.compression.job import prepare
from llmcompress.compression.layers import TARGET_DAMPING, to_dense_outputs
from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.export import export
from llmcompress.methods.layer import apply, step
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.rules import InputRounding
from llmcompress.weight.expression import dense
from llmcompress.weight.inputs import FP8, InputFormat
from tests.builders import correlated, gaussian, layer
from tests.tiny import save_tiny

IDS = torch.arange(30)[None] * 7 % 256
FP8_STEP: dict[str, Any] = {"method": "gptq", "format": "fp8"}
RULES: list[dict[str, Any]] = [
    {"match": "*.[qkv]_proj", "steps": [FP8_STEP], "inputs": {"format": "fp8", "scale": "tensor"}},
    {"match": "*.o_proj", "steps": [FP8_STEP], "inputs": {"format": "fp8"}},
    {"match": "*.down_proj", "steps": [{"method": "rtn", "bits": 8}], "inputs": {"format": "int8"}},
    {"match": "*", "steps": [{"method": "mxfp", "format": "nvfp4"}], "inputs": {"format": "nvfp4"}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a loud channel, so that rounding matters, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny("llama", folder / "dense", dtype=torch.bfloat16, intermediate_size=64, hidden_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    for block in model.model.layers:
        block.input_layernorm.weight.data[3] = 40
    model.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("".join(f"{i}. The miller counts every sack of corn. " for i in range(80)))
    return folder


def recipe(place: Path, rules: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    data = {"dataset": str(place / "text.txt"), "samples": 12, "length": 32, "held_out": 4}
    return {"version": 1, "rules": rules, "calibration": data} | more


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    return lc.compress(place / "dense", recipe(place, RULES, asymmetric=0.5), place / "small").folder


@pytest.mark.parametrize("aim", [None, 0.25])
def test_moments_are_those_of_rounded_inputs(place: Path, aim: float | None) -> None:
    """Beside them the products with the exact inputs, of which a share may be the dense model's."""
    source, name = resolve(str(place / "dense")), "model.layers.0.mlp.down_proj"
    asked = {name: InputRounding(format="int8"), "model.layers.0.self_attn.q_proj": InputRounding(format="nvfp4")}
    needs = {each: frozenset({"outer", "cross"}) for each in asked}
    statistics = Statistics(needs, None, inputs=asked, cross=aim is not None, aim=aim or 0.0)
    seen: list[Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sequences = IDS.repeat(4, 1) + torch.arange(4)[:, None]
    with torch.no_grad():
        model(sequences)
    block = next(walk(source, architecture(source.config, source.skeleton()), sequences, statistics))
    [group] = [group for group in block.groups if name in group.names]
    x = seen[0].flatten(0, 1)
    rounded = InputFormat("int8").round(x)
    assert group.format == InputFormat("int8") and group.inputs.outer is not None and group.inputs.cross is not None
    for found, wanted in ((group.inputs.outer, rounded.T @ rounded), (group.inputs.cross, x.T @ rounded)):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    [other] = [group for group in block.groups if name not in group.names]
    assert other.format is not None and other.format.scale is not None


def test_the_checkpoint_rounds_inputs_as_calibrated(small: Path) -> None:
    """A dense model with the same matrices, whose inputs are rounded by hand, has the same logits."""
    layouts = CompressedCheckpoint(small).layouts
    scales = {layouts[f"model.layers.0.self_attn.{part}_proj"].inputs for part in "qkv"}
    [shared] = scales
    assert shared is not None and shared.format == "fp8" and shared.scale is not None
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    by_hand = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).dequantize()
    with torch.no_grad():
        ours, unrounded = model(IDS).logits, by_hand(IDS).logits
        for name, layout in layouts.items():
            form = layout.inputs
            assert form is not None
            hook = lambda _, args, form=form: (form.round(args[0]),)  # noqa: E731
            by_hand.get_submodule(name).register_forward_pre_hook(hook)
        assert torch.allclose(by_hand(IDS).logits, ours, atol=2e-2)
        assert float((unrounded - ours).norm()) > 3 * float((by_hand(IDS).logits - ours).norm())


def test_adapters_beside_rounded_inputs_are_not_folded(small: Path) -> None:
    """They read the inputs as they are."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(small), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(InputError, match=r"o_proj: its inputs are rounded, .*; keep the adapter beside the model"):
        lc.fold(adapted)


@pytest.mark.parametrize("form", [InputFormat("int8"), InputFormat("nvfp4", 100.0)], ids=str)
def test_weights_are_fitted_to_rounded_inputs(form: InputFormat) -> None:
    """On the calibration inputs, the error of a layer's outputs is less than where nobody told the method. The target
    is the damped solution of least squares for the exact outputs."""
    weight, x = gaussian(48, 64), correlated(400, 64)
    x[:, 3] *= 60
    rounded = form.round(x)
    known = Moments.of(rounded, frozenset({"outer", "cross"}), dense_inputs=x)
    assert known.cross is not None
    target = weight + to_dense_outputs(weight, known, known.cross)
    seen, wanted = rounded.double(), x.double() @ weight.double().T
    damping = TARGET_DAMPING * seen.square().sum(0).mean() * torch.eye(64).double()
    oracle = torch.linalg.solve(seen.T @ seen + damping, seen.T @ wanted + damping @ weight.double().T).T
    assert float((target - oracle).norm() / (weight - oracle).norm()) < 1e-3

    def lost(approx: Tensor) -> float:
        return float((seen @ approx.double().T - wanted).norm() / wanted.norm())

    assert lost(target) < lost(weight)
    config = step({"method": "gptq", "bits": 4})
    told = apply(replace(layer(target, rounded), inputs=known), [config])
    untold = apply(layer(weight, x), [config])
    assert lost(dense(told.expression())) < lost(dense(untold.expression()))


def test_calibrated_scales_hold_the_largest_input(place: Path, small: Path) -> None:
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place, RULES)))
    assert job.tokens is not None
    model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    peaks: list[float] = []
    name = "model.layers.0.self_attn.k_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: peaks.append(float(args[0].abs().max())))
    with torch.no_grad():
        model(job.tokens.sequences[: len(job.tokens.sequences) - job.tokens.held_out])
    form = CompressedCheckpoint(small).layouts[name].inputs
    assert form is not None and form.scale is not None and abs(form.scale * FP8 / max(peaks) - 1) < 0.01


def test_other_exports_say_that_inputs_stay(small: Path, tmp_path: Path) -> None:
    done = export(small, tmp_path / "dense", "dense")
    assert "inputs of 14 matrices are no longer rounded" in done.changed


@pytest.mark.parametrize(
    ("rules", "more", "sentence"),
    [
        ([{"match": "*", "steps": [], "inputs": {"format": "fp8"}}], {}, "layers that stay dense get their inputs"),
        (
            [{"match": "*", "steps": [FP8_STEP], "inputs": {"format": "nvfp4", "scale": "token"}}],
            {},
            "so none by token",
        ),
        (
            [{"match": "*", "steps": [FP8_STEP], "inputs": {"format": "mxfp8", "scale": "tensor"}}],
            {},
            "leave scale out",
        ),
        ([{"match": "*", "steps": [FP8_STEP], "inputs": {"format": "int4"}}], {}, "format"),
        ([{"match": "*", "steps": [FP8_STEP], "inputs": {"format": "fp8"}}], {"tie": {"blocks": 1}}, "not with tie"),
        (
            [{"match": "*", "steps": [{"method": "mxfp"}], "inputs": {"format": "nvfp4"}}],
            {"calibration": None},
            "is calibrated; add calibration",
        ),
        (
            [
                {"match": "*.q_proj", "steps": [FP8_STEP]},
                {"match": "*", "steps": [FP8_STEP], "inputs": {"format": "fp8"}},
            ],
            {},
            "q_proj and model.layers.0.self_attn.k_proj read the same input",
        ),
    ],
)
def test_nonsense_is_refused_in_a_sentence(
    place: Path, rules: list[dict[str, Any]], more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        prepare(resolve(str(place / "dense")), read_recipe(recipe(place, rules) | more))


def test_groups_that_do_not_divide_a_width_are_refused(tmp_path: Path) -> None:
    source = resolve(str(save_tiny("llama", tmp_path / "dense")))  # a width of 48
    rules = [{"match": "*.down_proj", "steps": [{"method": "mxfp"}], "inputs": {"format": "mxfp8"}}]
    with pytest.raises(RecipeError, match="groups of 32, which do not divide the 48 of"):
        prepare(source, read_recipe({"version": 1, "rules": [*rules, {"match": "*", "steps": []}]}))


def test_dynamic_scales_need_no_text(place: Path, tmp_path: Path) -> None:
    rules = [{"match": "*", "steps": [{"method": "mxfp", "format": "fp8"}], "inputs": {"format": "fp8"}}]
    folder = lc.compress(place / "dense", {"version": 1, "rules": rules}, tmp_path / "out").folder
    assert {layout.inputs for layout in CompressedCheckpoint(folder).layouts.values()} == {InputFormat("fp8")}
