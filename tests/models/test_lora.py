"""PEFT on compressed layers: adapters attach by the usual names, training changes nothing else, and become part of the
model exactly or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.kernels.accelerate import accelerate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import compressed_linears, compressed_modules
from tests.tiny import save_tiny

RULES = [
    {"match": "*.v_proj", "steps": [{"method": "magnitude", "pattern": "2:4"}]},
    {"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}, {"method": "svd", "rank": 2}]},
]
IDS = torch.arange(30)[None] * 7 % 256
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    source = save_tiny("llama", place / "dense", tie_word_embeddings=True)
    embeddings = [{"method": "rtn", "bits": 4}]
    return lc.compress(source, {"version": 1, "rules": RULES, "embeddings": embeddings}, place / "out").folder


def compressed(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def payloads(model: torch.nn.Module) -> list[torch.Tensor]:
    return [module.get_parameter("weight").clone() for module in compressed_modules(model).values()]


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_changes_the_adapter_alone(dora: bool, folder: Path, tmp_path: Path) -> None:
    """Through transformers' own Trainer; what it saves loads on top of the checkpoint."""
    lora = LoraConfig(r=2, use_dora=dora, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(compressed(folder), lora)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    rows: list[dict[str, Any]] = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    settings = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.05, report_to="none", use_cpu=True, save_strategy="no"
    )
    Trainer(model=adapted, args=settings, train_dataset=rows).train()
    after = adapted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(compressed(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted))
    assert not torch.allclose(logits(again), logits(compressed(folder)), atol=1e-3)


@pytest.mark.slow
def test_supervised_fine_tuning(folder: Path, tmp_path: Path) -> None:
    """TRL's trainer attaches the adapter itself, and multiplies by the head's matrix without calling the head."""
    model = compressed(folder)
    before, expected = payloads(model), logits(model)
    rows = Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4)
    settings = SFTConfig(
        str(tmp_path), max_steps=3, learning_rate=0.05, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    lora = LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    with lc.plain_head(model):
        assert model.lm_head.weight.shape == (264, 32)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        trainer = SFTTrainer(
            model, args=settings, train_dataset=rows, peft_config=lora, processing_class=load_tokenizer(folder)
        )
        trainer.train()
        trained = logits(trainer.model)
    assert all(map(torch.equal, payloads(model), before)) and not torch.allclose(trained, expected, atol=1e-3)
    folded = lc.fold(trainer.model)
    folded.save_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(compressed(tmp_path / "folded")), trained, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_not_compressed_stays(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path))
    head = model.lm_head
    with lc.plain_head(model):
        assert model.lm_head is head


def test_dora_begins_at_the_model_as_it_is(folder: Path) -> None:
    """Its magnitudes are the norms of the decoded rows, so nothing changes before training."""
    expected = logits(compressed(folder))
    adapted = get_peft_model(compressed(folder), LoraConfig(r=2, use_dora=True, target_modules=TARGETS))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, dense(layer.get_base_layer().expression()).norm(dim=1))


@pytest.mark.parametrize(
    "kind",
    [
        LoraConfig(r=2, target_modules=TARGETS),
        LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
        IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    ],
    ids=["lora", "dora", "ia3"],
)
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_into_codes_is_refused(kind: PeftConfig, safe: bool, folder: Path) -> None:
    """By every door of PEFT, and nothing is changed: the adapter keeps working."""
    adapted = get_peft_model(compressed(folder), kind).eval()
    before, expected = payloads(adapted), logits(adapted)
    sentence = r"cannot merge an adapter into model\.layers\.0\.\w+\.\w+, which is compressed; .* llmcompress\.fold"
    with pytest.raises(InputError, match=sentence):
        adapted.merge_and_unload(safe_merge=safe)
    with pytest.raises(InputError, match=sentence):
        adapted.merge_adapter(safe_merge=safe)
    assert all(map(torch.equal, payloads(adapted), before)) and torch.equal(logits(adapted), expected)


def test_a_dense_model_still_merges(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_payload_overwritten_from_outside_is_noticed(folder: Path) -> None:
    """As by a layer's own merge, which asks nobody."""
    model = compressed(folder)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data = torch.zeros(layer.out_features, layer.in_features)
    with pytest.raises(InputError, match="was overwritten, as by merging an adapter into it; load the model again"):
        logits(model)


@pytest.mark.nightly
@pytest.mark.parametrize("first", ["llmcompress", "peft"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    """PEFT learns of compressed weights whoever comes first; llmcompress alone does not import it."""
    second = "peft" if first == "llmcompress" else "llmcompress"
    code = f"""
import sys, {first}
assert ("peft" in sys.modules) == ({first!r} == "peft")
import {second}, peft.tuners.tuners_utils as tuners
assert tuners.BaseTuner._check_merge_allowed.__wrapped__
assert not hasattr(tuners.BaseTuner._check_merge_allowed.__wrapped__, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rank", [2, 5])
def test_an_adapter_is_folded_exactly(rank: int, folder: Path, tmp_path: Path) -> None:
    base = compressed(folder)
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=3, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(compressed(folder)), atol=1e-2)
    folded = lc.fold(adapted)
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-5)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(compressed(tmp_path / "folded")), logits(folded))


def test_an_adapter_that_transformers_loaded_is_folded_and_saved(folder: Path, tmp_path: Path) -> None:
    """Its file has names of PEFT's, which the folded model has not."""
    adapted = drawn(get_peft_model(compressed(folder), LoraConfig(r=2, target_modules=TARGETS))).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model: Any = compressed(folder)
    model.load_adapter(str(tmp_path / "adapter"))
    folded = lc.fold(model)
    torch.testing.assert_close(logits(folded), logits(adapted), rtol=1e-4, atol=1e-5)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(compressed(tmp_path / "folded")), logits(folded))


def drawn(model: Any) -> Any:
    """A model whose adapters have random weights."""
    random = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=random)
    return model


def test_what_is_folded_has_kernels(folder: Path) -> None:
    """In the mode of before."""
    model = compressed(folder)
    accelerate(model, "int8")
    folded = lc.fold(get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")))
    fast: dict[str, Any] = {
        name: layer.fast for name, layer in compressed_linears(folded).items() if layer.fast is not None
    }
    assert {each.mode for each in fast.values()} == {"int8"} and any("v_proj" in name for name in fast)
    assert fast.keys() == set(accelerate(folded).kernels)


def test_several_active_adapters_are_folded(folder: Path) -> None:
    adapted = get_peft_model(compressed(folder), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.add_adapter("second", LoraConfig(r=3, lora_alpha=2, target_modules=["v_proj", "down_proj"]))
    adapted.add_adapter("third", LoraConfig(r=3, target_modules=["o_proj"]))
    adapted.base_model.set_adapter(["default", "second"])
    expected = logits(drawn(adapted).eval())
    torch.testing.assert_close(logits(lc.fold(adapted)), expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_dense_layers_are_merged(tmp_path: Path) -> None:
    """A head that is tied to a dense table, beside compressed linears: the table stays, the head goes its own way."""
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True)
    model = lc.compress(source, {"version": 1, "rules": RULES}, tmp_path / "out").model
    table = model.get_input_embeddings().weight.clone()
    adapted = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))).eval()
    expected = logits(adapted)
    folded = lc.fold(adapted)
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(folded.get_input_embeddings().weight, table)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(compressed(tmp_path / "folded")), logits(folded))


def test_what_linears_have_in_common_stays_when_one_is_adapted(tmp_path: Path) -> None:
    recipe = {"version": 1, "tie": {"blocks": 1}, "rules": RULES}
    model = lc.compress(save_tiny("llama", tmp_path / "dense"), recipe, tmp_path / "out").model
    adapted = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.0\..*q_proj"))).eval()
    expected = logits(adapted)
    folded = lc.fold(adapted)
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-5)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(compressed(tmp_path / "folded")), logits(folded))


def test_a_model_without_adapters_is_not_folded(folder: Path) -> None:
    with pytest.raises(InputError, match="the model has no adapter; fold the one"):
        lc.fold(compressed(folder))
    adapted = get_peft_model(compressed(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.base_model.set_adapter([])
    with pytest.raises(InputError, match="touches no layer of the model"):
        lc.fold(adapted)


def test_only_plain_lora_is_folded(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="is not compressed; merge adapters of dense layers"):
        lc.fold(adapted)
    with pytest.raises(InputError, match="only plain LoRA can be folded"):
        lc.fold(get_peft_model(compressed(folder), LoraConfig(r=2, target_modules=["v_proj"], lora_bias=True)))
