"""Activations that are computed again: they are, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import llmcompress as lc
from llmcompress.distillation.objective.forward import recompute_activations
from llmcompress.distillation.run import distill
from llmcompress.errors import RecipeError
from tests.distillation.miniature import TEXT
from tests.distillation.test_dense_students import asked, tensors
from tests.tiny import save_tiny, tiny

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model, one made `small`, and a text."""
    place = tmp_path_factory.mktemp("recompute")
    save_tiny("llama", place / "dense")
    lc.compress(place / "dense", {"version": 1, "rules": RULES}, place / "small")
    (place / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return place


def calls(student: Path, place: Path, recipe: dict[str, Any], output: Path) -> int:
    """Count the runs of blocks, the student's and the teacher's, in a distillation."""
    with mock.patch.object(LlamaMLP, "forward", autospec=True, side_effect=LlamaMLP.forward) as forward:
        distill(student, place / "dense", recipe, output)
    return forward.call_count


@pytest.mark.parametrize("compute", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "student, rates",
    [
        ("small", {"codes": 1e-2, "scales": 1e-2, "norms": 1e-2}),
        pytest.param("dense", {"weights": 1e-2}, marks=pytest.mark.slow),
    ],
)
def test_a_training_runs_every_block_once_more(
    student: str, rates: dict[str, float], compute: str, place: Path, tmp_path: Path
) -> None:
    recipe = asked(place, steps=3, rates=rates, compute=compute, losses=[{"of": {"loss": "cross_entropy"}}])
    kept = calls(place / student, place, recipe, tmp_path / "kept")
    again = calls(place / student, place, recipe | {"checkpointing": True}, tmp_path / "again")
    steps, parts, blocks = 3, 2, 2
    assert again - kept == steps * parts * blocks + 2 * blocks  # the student is tried on two tokens before, twice
    one, other = tensors(tmp_path / "kept"), tensors(tmp_path / "again")
    assert one.keys() == other.keys()
    for name, value in one.items():
        if compute == "float32":
            assert torch.equal(value, other[name]), name
        else:  # attention that is not computed again is another, faster one
            assert float((value.double() - other[name].double()).norm()) <= 0.05 * float(value.double().norm()), name


def states(model: Any) -> Tensor:
    """The last hidden states, with gradient."""
    found: Tensor = model.base_model(input_ids=IDS, use_cache=False)[0]
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gpt2", "gemma3_text"])
def test_nothing_is_left_to_chance(family: str) -> None:
    """Some families are configured with dropout, of which only a training of their own should know."""
    model: Any = tiny(family).requires_grad_(True)
    given = next(value for name, value in model.named_parameters() if "layers." in name or ".h." in name)
    wanted = states(model)
    [slope] = torch.autograd.grad(wanted.square().sum(), given)
    with recompute_activations(model):
        found = states(model)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        [again] = torch.autograd.grad(found.square().sum(), given)
    torch.testing.assert_close(again, slope, rtol=1e-6, atol=1e-6)
    assert not any(module.training for module in model.modules())


def test_blocks_that_drop_out_are_refused() -> None:
    model = tiny("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, parallel_attn=False)
    model.config.attention_dropout = 0.5
    with pytest.raises(RecipeError, match="apply dropout in training"), recompute_activations(model):
        pass
