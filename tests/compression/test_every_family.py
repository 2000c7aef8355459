"""Every recommended recipe on every family, without a special setting: compressed, loaded, asked, and judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.models.transformers.dequantize import dequantize
from llmcompress.recipe.library import library
from llmcompress.recipe.read import read_recipe
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS
from tests.zoo import ENCODERS, EVERY, REFUSED, save_any

RECIPES = [one.name for one in library() if one.group == "recommended"]
SIXTEEN = (
    *("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "cohere2"),  # q, k and v apart
    *("phi3", "gpt2", "gpt_neox", "falcon", "bloom", "opt"),  # fused, or by other names
    *("mixtral", "qwen3_moe"),
)
UNLIKE = ("gpt2", "mixtral")  # transposed, experts
LONG = ("balanced", "budget-2-tuned", "partial-binarization")
EACH = 16  # a slow test has every recipe on this share of families, in turn, and a nightly one on the others


def tier(recipe: str, family: str) -> Any:
    """Return the marks of a pair. Fast: most recipes on a plain model, and that of most users on two others."""
    if (family == "llama" and recipe not in LONG) or (recipe == "default" and family in UNLIKE):
        return ()
    if family == "llama" or recipe == "default":
        return pytest.mark.slow
    turn = (RECIPES.index(recipe) + SIXTEEN.index(family)) % EACH
    return pytest.mark.nightly if turn else pytest.mark.slow


PAIRS = [pytest.param(recipe, family, marks=tier(recipe, family)) for recipe in RECIPES for family in SIXTEEN]
WIDER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}  # ranks of the recipes fit
WIDER_BY_FAMILY: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in ("deepseek_v2", "deepseek_v3")},  # else they generate nothing
    "gpt2": {"n_embd": 64, "n_inner": 96},
    "opt": {"hidden_size": 64, "ffn_dim": 96},
    **dict.fromkeys(("gemma2", "gemma3_text", "qwen3"), WIDER | {"head_dim": 16}),
}
BY_TOKEN = ("zamba2", "gemma4_text")  # blocks see the embeddings too, so none learns by itself
SHORT = ["calibration.samples=4", "calibration.length=32"]  # else as shipped
BRIEF = ["reconstruct.steps=2"]
TAUGHT = ["distill.data.samples=8", "distill.data.length=32", "distill.steps=2"]
IDS = torch.tensor([[1, 5, 200, 5, 12, 0, 77]])


Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a family's tiny model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            changes = WIDER_BY_FAMILY.get(family, WIDER if family in FAMILY_CONFIGS else {})
            made[family] = save_any(family, tmp_path_factory.mktemp(family), **changes)
        return made[family]

    return get


def compressed(source: Path, recipe: str, output: Path) -> lc.Result:
    """Compress a model by a recommended recipe, on little text."""
    asked = read_recipe(recipe)
    text = asked.calibration
    settings = [] if text is None else [*SHORT, f"calibration.held_out={int(text.held_out > 0)}"]
    settings = settings if asked.reconstruct is None else [*settings, *BRIEF]
    settings = settings if asked.distill is None else [*settings, *TAUGHT]
    return lc.compress(source, read_recipe(recipe, settings), output)


def check(source: Path, recipe: str, output: Path) -> None:
    """Assert that the result of a recipe loads, generates, and predicts as its decoded weights do, not as dense ones.

    Zeros in place of a layer would have an error of 1.
    """
    assert all(layer.error < 1 for layer in compressed(source, recipe, output).report.layers)
    ours: Any
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (output, source))
    with torch.no_grad():
        predicted, true = (model(IDS).logits for model in (ours, theirs))
        decoded = dequantize(copy.deepcopy(ours), torch.float32)(IDS).logits
    assert (predicted - decoded).norm() <= 1e-4 * decoded.norm()
    assert not torch.equal(predicted, true)
    assert ours.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize("recipe, family", PAIRS)
def test_every_recommended_recipe_works_on_every_family(recipe: str, family: str, dense: Made, tmp_path: Path) -> None:
    check(dense(family), recipe, tmp_path / "out")


@pytest.mark.parametrize(
    "family", tiered(SIXTEEN, {"llama"}.__contains__, slow={"gpt2", "mixtral", "phi3", "bloom"}.__contains__)
)
def test_a_plan_refuses_what_a_run_refuses(family: str, dense: Made) -> None:
    """As shipped, though the context of these models is shorter than the default length of calibration."""
    for recipe in RECIPES:
        asked = read_recipe(recipe)
        texts = [asked.calibration, *([] if asked.distill is None else asked.distill.texts())]
        if all(text is None or "length" not in text.model_fields_set for text in texts):
            assert lc.plan(dense(family), asked).layers


@pytest.mark.nightly
@pytest.mark.parametrize("family", [family for family in EVERY if family not in (*SIXTEEN, *ENCODERS, *REFUSED)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_other_families_do_too(recipe: str, family: str, dense: Made, tmp_path: Path) -> None:
    if family in BY_TOKEN and recipe == "budget-2-tuned":
        with pytest.raises(InputError, match="depend on the tokens, so they cannot learn one by one"):
            compressed(dense(family), recipe, tmp_path / "out")
        return
    check(dense(family), recipe, tmp_path / "out")
