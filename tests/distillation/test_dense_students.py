"""Dense students: checkpoints of fewer blocks, compressed ones of unequal widths, and what comes back of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.distillation.run import distill
from llmcompress.errors import RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.models.files import tensor_files
from llmcompress.weight.modules import compressed_linears
from tests.distillation.miniature import TEXT
from tests.models.test_structure import RECIPE, narrow, save
from tests.tiny import save_tiny, tiny, tiny_tokenizer

RATES = {"weights": 2e-2, "norms": 1e-2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks, a `short` one in bfloat16 without the third, and a text."""
    place = tmp_path_factory.mktemp("students")
    save_tiny("llama", place / "dense", num_hidden_layers=4, tie_word_embeddings=True)
    short: Any = tiny("llama", num_hidden_layers=4, tie_word_embeddings=True)
    del short.model.layers[2]
    short.config.num_hidden_layers = 3
    short.to(torch.bfloat16).save_pretrained(place / "short")
    tiny_tokenizer().save_pretrained(place / "short")
    (place / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return place


def asked(place: Path, **more: Any) -> dict[str, Any]:
    """A recipe on the text."""
    data = {"dataset": str(place / "text.txt"), "samples": 28, "length": 32, "held_out": 4}
    exact = {"batch": 4, "micro_batch": 2, "evaluate_every": 100, "compute": "float32"}
    return {"version": 1, "data": data, "rates": RATES, **exact} | more


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that the weight files of a folder hold."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_a_shortened_model_is_recovered(place: Path, tmp_path: Path) -> None:
    done = distill(place / "short", place / "dense", asked(place, steps=10), tmp_path / "out")
    assert done.history[-1]["kl"] < 0.7 * done.history[0]["kl"]
    before, after = tensors(place / "short"), tensors(tmp_path / "out")
    assert {name: (value.dtype, value.shape) for name, value in before.items()} == {
        name: (value.dtype, value.shape) for name, value in after.items()
    }
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["model.embed_tokens.weight"]
    assert done.trained["weights"] == sum(value.numel() for name, value in before.items() if "_proj" in name)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == 3 and model.dtype == torch.bfloat16
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == (place / "short" / name).read_text()
    protocol = lc.Protocol(place / "text.txt", windows=4, length=32)
    scores = [
        lc.score(folder, protocol, against=str(place / "dense")) for folder in (place / "short", tmp_path / "out")
    ]
    assert scores[1]["kl"] < 0.7 * scores[0]["kl"]


@pytest.mark.slow
def test_steps_below_the_resolution_of_bfloat16_add_up(place: Path, tmp_path: Path) -> None:
    """bfloat16 resolves 1/128 to 1/256 of a number: steps of 1/1000 round away one by one."""
    small = asked(place, steps=12, rates={"weights": 1e-3}, warmup=0, final_rate=1)
    distill(place / "short", place / "dense", small, tmp_path / "out")
    before, after = tensors(place / "short"), tensors(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    large = before[name].abs() > before[name].float().square().mean().sqrt()
    assert float((before[name] != after[name])[large].float().mean()) > 0.2


@pytest.mark.slow
def test_weight_files_stay_below_a_limit(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHARD", 20_000)
    distill(place / "short", place / "dense", asked(place, steps=1), tmp_path / "out")
    parts = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(parts) > 2
    assert all(sum(value.nbytes for value in part.values()) <= 20_000 for part in parts)
    assert sorted(name for part in parts for name in part) == sorted(tensors(place / "short"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_dense_weights_of_a_compressed_student_train(place: Path, tmp_path: Path) -> None:
    """Unequal widths, one block compressed, the other dense."""
    model = lc.compress(save_tiny("llama", tmp_path / "dense"), RECIPE, tmp_path / "small").model
    sizes = narrow(model)
    save(model, sizes, tmp_path / "narrow")
    rates = {"weights": 2e-2, "scales": 1e-2}
    done = distill(tmp_path / "narrow", tmp_path / "dense", asked(place, steps=8, rates=rates), tmp_path / "out")
    assert done.history[-1]["kl"] < 0.9 * done.history[0]["kl"] and set(done.trained) == set(rates)
    assert verify(tmp_path / "out", text=place / "text.txt", length=16).layers == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = tensors(tmp_path / "narrow"), tensors(tmp_path / "out")
    moved = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    in_first = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    assert moved == compressed_linears(again).keys() | sizes.keys() | in_first
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sizes"] == sizes


def test_a_dense_student_needs_a_rate_for_its_weights(place: Path, tmp_path: Path) -> None:
    recipe = asked(place)
    del recipe["rates"]
    with pytest.raises(RecipeError, match=r"no factors and no scales; give a rate for its weights, as in {weights"):
        distill(place / "short", place / "dense", recipe, tmp_path / "out")
    only_norms = distill(place / "short", place / "dense", asked(place, steps=1, rates={"norms": 1e-3}), tmp_path / "n")
    assert set(only_norms.trained) == {"norms"}
