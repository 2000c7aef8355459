"""A folder of PEFT is the model that PEFT's own merge makes of it and its base, or is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import llmcompress as lc
from llmcompress.data.generate import end_tokens
from llmcompress.errors import InputError
from llmcompress.models.dense import adapter
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from tests.tiny import VOCABULARY, save_tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(24)[None] * 7 % VOCABULARY
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA, ranks by layer": {
        "use_rslora": True,
        "rank_pattern": {r"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"down_proj": 7},
        "layers_to_transform": [1],
    },
    "DoRA": {"use_dora": True},
    "a table, and a head trained whole": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
}
RECIPE: dict[str, Any] = {
    "version": 1,
    "rules": [{"match": "*_proj", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base") / "model")


def adapted(base: Path, to: Path, **changes: Any) -> Path:
    """Write an adapter with random numbers in all of its tensors."""
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**(settings | changes)))
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(to)
    return to


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_merges_it(kind: str, base: Path, tmp_path: Path) -> None:
    folder = adapted(base, tmp_path / "adapter", **KINDS[kind])
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    source, plain = resolve(folder), resolve(base)
    changed = [name for name in plain.tensors if not torch.equal(source.read(name), plain.read(name))]
    assert len(changed) == {"plain": 6, "DoRA": 6, "rsLoRA, ranks by layer": 3}.get(kind, 4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(source.read(name), value, rtol=1e-6, atol=1e-6)
    assert source.notes == ("the adapter adapter is merged into model, whose tokenizer and chat template stay",)
    logits = expected(input_ids=IDS).logits
    for model in (load_model(locate(folder)), source.load()):
        torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_is_compressed_as_the_merged_model(base: Path, tmp_path: Path) -> None:
    folder = adapted(base, tmp_path / "adapter")
    source = resolve(folder)
    merged = shutil.copytree(base, tmp_path / "merged")
    save_file({name: source.read(name) for name in source.tensors}, merged / WEIGHTS, metadata={"format": "pt"})
    results = [lc.compress(each, RECIPE, tmp_path / f"from-{each.name}") for each in (folder, merged)]
    ours, theirs = (load_file(result.folder / WEIGHTS) for result in results)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert any("is merged into model" in warning for warning in results[0].report.warnings)
    before = source.content()
    change_json(folder / "adapter_config.json", lora_alpha=6)
    after = resolve(folder).content()
    assert {name for name in before if before[name] != after[name]} == {"the model's config.json"}


def test_the_content_is_the_same_wherever_the_adapter_lies(base: Path, tmp_path: Path) -> None:
    middle = shutil.copytree(base, tmp_path / "m")
    shutil.copytree(adapted(middle, tmp_path / "a"), tmp_path / "z")
    assert resolve(tmp_path / "a").content() == resolve(tmp_path / "z").content()


def test_the_generation_config_of_the_base_counts(base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    GenerationConfig(eos_token_id=[257, 65], repetition_penalty=1.3).save_pretrained(own)
    assert end_tokens(resolve(own).load()) == {257, 65}
    assert load_model(locate(adapted(own, tmp_path / "adapter"))).generation_config.repetition_penalty == 1.3
    (own / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json is broken .*; correct or remove it"):
        resolve(own).load()


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(tensors, folder / ADAPTER)

    return edit


def configured(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / "adapter_config.json", **changes)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind": (configured(peft_type="IA3"), "an adapter of the kind 'IA3', no LoRA; merge it with PEFT"),
    "no base": (configured(base_model_name_or_path=None), "names no model as base_model_name_or_path; add the one"),
    "a missing base": (
        configured(base_model_name_or_path="/nowhere/model"),
        "/nowhere/model does not exist; give a .* as base_model_name_or_path of the adapter .*adapter",
    ),
    "a base of words": (configured(base_model_name_or_path=["x"]), "names no model as base_model_name_or_path"),
    "code by name": (configured(megatron_config={"a": 1}), "has megatron_config, which is more than a term of linears"),
    "a broken config": (configured(r="many", target_modules=3), "is no config of PEFT|does not|cannot be read as"),
    "another rank": (configured(r=3), "q_proj.weight in .* cannot be read as the base of adapter .*; download or copy"),
    "no weights": (lambda folder: (folder / ADAPTER).unlink(), "has an adapter_config.json and no adapter_model.safet"),
    "half a term": (edited(lambda t: t.pop(A)), "does not fit model.layers.0.self_attn.q_proj of .*model; correct"),
    "another width": (edited(lambda t: t.update({A: torch.ones(2, 33)})), "does not fit model.layers.0.self_attn.q"),
    "another model": (
        edited(lambda t: t.update({A.replace("layers.0", "layers.7"): t.pop(A)})),
        "layers.7.self_attn.q_proj.lora_A.weight of the adapter .* is for what .*model lacks; correct base_model_name",
    ),
    "integers": (edited(lambda t: t.update({A: t[A].int()})), "is nothing that is merged into model.layers.0"),
    "nothing in it": (edited(lambda t: t.clear()), "holds no weights; save it again where they are whole"),
    "other tensors": (
        edited(lambda t: t.update({"base_model.model.x": t[A].clone()})),
        "is merged into x here",
    ),
}


def test_an_adapter_of_itself_is_refused(base: Path, tmp_path: Path) -> None:
    first, second = (adapted(base, tmp_path / name) for name in ("first", "second"))
    for folder, named in ((first, first), (first, second)):
        change_json(folder / "adapter_config.json", base_model_name_or_path=str(named))
        with pytest.raises(InputError, match="is an adapter of .*, which is one itself; merge"):
            resolve(folder)


@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_adapters_are_refused_in_one_sentence(damage: str, base: Path, tmp_path: Path) -> None:
    folder = adapted(base, tmp_path / "adapter")
    edit, sentence = HOSTILE[damage]
    edit(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        source = resolve(folder)
        for name in source.tensors:
            source.read(name)
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_a_model_is_not_ignored(base: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and the adapter."""
    folder = adapted(base, tmp_path / "both")
    shutil.copy(base / WEIGHTS, folder)
    shutil.copy(base / "config.json", folder)
    with pytest.raises(InputError, match="beside its weights.*; remove that file, or merge the adapter"):
        resolve(folder)


def test_an_adapter_of_a_tied_table_and_of_an_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    folder = adapted(tied, tmp_path / "of-table", target_modules=["embed_tokens"])
    with pytest.raises(
        InputError, match="is for a table that is the head too in its base; give the base a head of its"
    ):
        resolve(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(adapted(base, tmp_path / "adapter")))
    with pytest.raises(InputError, match="is an adapter of .*, which is one itself"):
        resolve(folder)


@torch.no_grad()
def test_the_way_out_of_a_tied_table_keeps_what_its_adapter_computes(tmp_path: Path) -> None:
    """PEFT's merge into the one matrix does not: then the head has the term of the table as well."""
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    folder = adapted(tied, tmp_path / "of-table", target_modules=["embed_tokens"])
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), folder)(IDS).logits
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), folder).merge_and_unload()
    assert float((merged(IDS).logits - expected).abs().max()) > 0.1
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.clone())
    peft.PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    found = load_model(locate(tmp_path / "merged"))(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_grown_table_is_read_with_a_grown_base(base: Path, tmp_path: Path) -> None:
    """PEFT writes the table and the head whole where tokens were added; it cannot load them into the base either."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 8)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder, grown = tmp_path / "adapter", tmp_path / "grown"
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=f"has {VOCABULARY + 8} rows, and its base has {VOCABULARY}; give the base as"):
        resolve(folder)
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(VOCABULARY + 8)
    larger.save_pretrained(grown)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(grown))
    with torch.no_grad():
        wanted, found = model.eval()(IDS).logits, load_model(locate(folder))(IDS).logits
    assert (wanted - found).abs().max() < 1e-5


def test_peft_is_named_where_it_is_missing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapted(base, tmp_path / "adapter")
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package peft; run `pip install peft`"):
        resolve(folder)
