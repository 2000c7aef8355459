"""Habits of those who use transformers and PEFT work on a compressed model, or are refused in a sentence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import llmcompress as lc
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.files.integrity import weight_files
from llmcompress.weight.modules import compressed_modules
from tests.tiny import save_tiny

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]
TABLE = [{"method": "rtn", "bits": 4}]
IDS = torch.arange(24)[None] * 7 % 256
# name: family, changes to its config, what else is compressed
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}, {"head": TABLE}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"embeddings": TABLE}),
    "gpt2": ("gpt2", {}, {}),  # whose linears are transposed
    "opt": ("opt", {}, {}),  # whose blocks lie deeper
    "gemma3_text": ("gemma3_text", {"tie_word_embeddings": True}, {"embeddings": TABLE}),  # whose rows are scaled
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model, beside its dense one."""
    family, changes, more = MODELS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    dense = save_tiny(family, place / "dense", **changes)
    return lc.compress(dense, {"version": 1, "rules": RULES, **more}, place / "out").folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("one")
    dense = save_tiny("llama", place / "dense", hidden_size=64)
    return lc.compress(dense, {"version": 1, "rules": RULES}, place / "out").folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).last_hidden_state
    return found


def test_weights_are_counted_not_bytes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.get_memory_footprint() < dense.get_memory_footprint()


def test_a_model_is_made_dense_again(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    dense = model.dequantize()
    assert not compressed_modules(dense)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense), rtol=0.0, atol=0.0
    )
    half = AutoModelForCausalLM.from_pretrained(folder).dequantize(dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_hidden_states_are_those_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    assert compressed_modules(model)
    assert torch.equal(states(model), states(whole.base_model))
    model.save_pretrained(tmp_path)
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path)), states(model))


def test_another_head_is_put_on_the_blocks(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama)
    whole = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(states(model.model), states(whole.model)) and logits(model).shape == (1, 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_damage_is_found_by_other_classes_too(kind: Any, llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = weight_files(tmp_path)[-1]
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        kind.from_pretrained(tmp_path)


def test_a_trainer_evaluates_but_trains_no_codes(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    data: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    asked = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, asked, train_dataset=data, eval_dataset=data)
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer.train()


def test_a_trainer_uses_one_of_several_gpus(llama: Path, tmp_path: Path) -> None:
    asked = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    assert asked.device.type == "cpu"
    asked._n_gpu = 2
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(llama), asked)
    data: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    with pytest.warns(UserWarning, match="one of 2 GPUs is used"):
        trainer.evaluate(data)
    assert asked.n_gpu == 1 and asked.train_batch_size == 8


def adapters() -> dict[str, Any]:
    """Configs of adapters that PEFT cannot put on codes, by name."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "up_proj"]
    starts = ("pissa", "pissa_niter_2", "olora", "corda", "orthogonal")
    found = {start: peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=start) for start in starts}
    loftq = peft.LoftQConfig(loftq_bits=4)
    found["loftq"] = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights="loftq", loftq_config=loftq)
    kinds = (peft.LoHaConfig, peft.LoKrConfig, peft.HRAConfig, peft.ShiraConfig)
    return found | {kind.__name__: kind(r=4, target_modules=targets) for kind in kinds}


def test_adapters_that_need_the_dense_weight_are_refused(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    for name, config in adapters().items():
        model = AutoModelForCausalLM.from_pretrained(llama)
        before, names = logits(model), [name for name, _ in model.named_modules()]
        with pytest.raises(InputError, match=r"PEFT cannot put .* plain LoRA, or make the model dense by"):
            peft.get_peft_model(model, config)
        assert [name for name, _ in model.named_modules()] == names, name
        assert torch.equal(logits(model), before), name


def test_adapters_that_leave_the_weight_alone_work_and_are_counted(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "up_proj"]
    kinds = [peft.LoraConfig(r=4, target_modules=targets), peft.VeraConfig(r=4, target_modules=targets)]
    kinds += [peft.IA3Config(target_modules=targets, feedforward_modules=["up_proj"])]
    for config in kinds:
        state = torch.get_rng_state()
        dense = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama.parent / "dense"), config)
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        assert torch.equal(torch.get_rng_state(), drawn), "trying a layer draws no random numbers"
        assert model.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
        model(IDS, labels=IDS).loss.backward()
        assert any(value.grad is not None for value in model.parameters())


def test_a_dense_model_takes_every_adapter(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    for name in ("olora", "LoHaConfig"):
        model = AutoModelForCausalLM.from_pretrained(llama.parent / "dense", dtype=torch.float32)
        assert peft.get_peft_model(model, adapters()[name])(IDS).logits.shape == (1, 24, 264)


@pytest.mark.parametrize("call", [lc.compress, lc.plan])
def test_objects_in_place_of_names_are_refused(call: Any, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    for given in (model, None, 5, ["x"]):
        with pytest.raises(InputError, match="models are read from disk.*save_pretrained"):
            call(given, {"version": 1, "rules": RULES})
    for given in (model, None, 5, ["x"]):
        with pytest.raises(RecipeError, match="the recipe is an object of type .*give the path"):
            call(llama.parent / "dense", given)


def test_scores_of_objects_are_refused(llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(InputError, match="models are read from disk"):
        lc.score(model)
    with pytest.raises(InputError, match="models are read from disk"):
        lc.compare([model, model])
    with pytest.raises(RecipeError, match="is one name"):
        lc.compare(str(llama))


@pytest.mark.slow
def test_threads_of_one_process_compress_as_one_does(llama: Path, tmp_path: Path) -> None:
    recipe = {"version": 1, "rules": RULES}
    folders = [tmp_path / str(number) for number in range(3)]
    with ThreadPoolExecutor(len(folders)) as threads:
        done = list(threads.map(lambda output: lc.compress(llama.parent / "dense", recipe, output).folder, folders))
    expected = {path.name: path.read_bytes() for path in weight_files(llama)}
    for folder in done:
        assert {path.name: path.read_bytes() for path in weight_files(folder)} == expected
