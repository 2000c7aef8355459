"""Uses of a compressed model that is loaded, beside the same of a dense model that holds its decoded weights.

The page `docs/how-to/use-the-model.md` lists them and no others."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.weight.modules import CompressedEmbedding, CompressedLinear, compressed_modules
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

PAGE = ROOT / "docs" / "how-to" / "use-the-model.md"
RULES = [
    {"match": "*.v_proj", "steps": [{"method": "magnitude", "pattern": "2:4"}]},
    {"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}, {"method": "svd", "rank": 2}]},
]
IDS = torch.arange(30)[None] * 7 % 256
TARGETS = ["q_proj", "v_proj", "down_proj"]
FAMILIES = ("llama", "gemma3_text")  # the second scales the rows of its table


@dataclass(frozen=True)
class Use:
    """A call, what comes of it, and the test that shows it for a checkpoint."""

    call: str
    outcome: str
    shown: Callable[[Path, Path], None]


USES: list[Use] = []


def use(call: str, outcome: str) -> Callable[[Callable[[Path, Path], None]], Callable[[Path, Path], None]]:
    """List the decorated test."""

    def listed(shown: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        USES.append(Use(call, outcome, shown))
        return shown

    return listed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("uses")
    found = {}
    for family in FAMILIES:
        dense = save_tiny(family, place / family / "dense", tie_word_embeddings=True)
        recipe = {"version": 1, "rules": RULES, "embeddings": [{"method": "rtn", "bits": 4}]}
        found[family] = lc.compress(dense, recipe, place / family / "out").folder
    return found


def compressed(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def both(folder: Path) -> tuple[Any, Any]:
    """The compressed model, and the dense one that holds its decoded weights."""
    return compressed(folder), compressed(folder).dequantize().eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model.eval()(ids).logits
    return found


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def same_training(model: Any, dense: Any) -> None:
    """Assert that logits and the gradients of all that trains are the dense model's, away from where it starts."""
    for one in (model, dense):
        random = torch.Generator().manual_seed(1)
        for _, value in one.eval().named_parameters():
            if value.requires_grad:
                value.data += 0.05 * torch.randn(value.shape, generator=random)
        one(IDS, labels=IDS).loss.backward()
    near(logits(model), logits(dense))
    expected = {name: value.grad for name, value in dense.named_parameters() if value.grad is not None}
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert expected and found.keys() == expected.keys()
    for name, gradient in expected.items():  # sums of many terms: on another processor their roundings differ
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def adapted(folder: Path, config: Any) -> tuple[Any, Any]:
    """Both models with the same adapter."""
    model, dense = both(folder)
    return by_peft(model, config), by_peft(dense, config)


def by_peft(model: Any, config: Any) -> Any:
    """Adapt a model, from the same random numbers at every call."""
    torch.manual_seed(0)
    return get_peft_model(model, copy.deepcopy(config))


def by_transformers(model: Any, config: Any) -> Any:
    """Adapt a model by its own method."""
    torch.manual_seed(0)
    model.add_adapter(copy.deepcopy(config))
    return model


def reloaded(folder: Path, model: Any, place: Path) -> Any:
    """Save an adapter, and load it on top of the checkpoint."""
    model.save_pretrained(place)
    return PeftModel.from_pretrained(compressed(folder), place).eval()


# --- as it is -------------------------------------------------------------------------------------------------------


@use("`model(ids)`, `model.generate(...)`", "as the dense model with the decoded weights")
def runs(folder: Path, place: Path) -> None:
    model, dense = both(folder)
    near(logits(model), logits(dense))
    near(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, logits(dense))
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS[:, :5], **asked), dense.generate(IDS[:, :5], **asked))


@use("`model.to(dtype)`, `model.half()`", "what is dense is cast; codes and their scales stay")
def is_cast(folder: Path, place: Path) -> None:
    model, dense = both(folder)
    payloads = [module.weight.clone() for module in compressed_modules(model).values()]
    found, expected = logits(model.to(torch.bfloat16)), logits(dense.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.05 * expected.abs().max()
    for dtype, cast in ((torch.float16, model.half), (torch.float32, model.float)):
        assert {value.dtype for value in cast().parameters()} == {dtype, torch.uint8}
    kept = [module.weight for module in compressed_modules(model).values()]
    assert all(map(torch.equal, kept, payloads))


@use("`copy.deepcopy(model)`, `pickle`, `model.load_state_dict(model.state_dict())`", "copies with the same bits")
def is_copied(folder: Path, place: Path) -> None:
    model = compressed(folder)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)  # noqa: S301 (our own bytes)
    torch.save(model.state_dict(), place / "state")
    other = compressed(folder)
    other.model.norm.weight.data.zero_()
    other.load_state_dict(torch.load(place / "state"))
    assert torch.equal(logits(other), expected)


@use(
    "`torch.export.export(model, ...)`, `torch.compile(model, fullgraph=True)`", "one program, for texts of any length"
)
def is_one_program(folder: Path, place: Path) -> None:
    model = compressed(folder)
    dims = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=60)}, "use_cache": None}
    inputs = {"input_ids": IDS, "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dims).module()
    for length in (30, 7):
        near(program(input_ids=IDS[:, :length], use_cache=False).logits, logits(model, IDS[:, :length]))


@use("`model.dequantize()`", "the dense model in memory; it saves as any other")
def becomes_dense(folder: Path, place: Path) -> None:
    model, dense = both(folder)
    near(logits(dense), logits(model))
    dense.save_pretrained(place)
    assert torch.equal(logits(compressed(place)), logits(dense)) and not compressed_modules(compressed(place))
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # never compressed
    fresh.save_pretrained(place / "fresh")
    assert torch.equal(logits(compressed(place / "fresh")), logits(fresh.eval()))


# --- saving and changing --------------------------------------------------------------------------------------------


@use("`model.save_pretrained(folder)`", "`from_pretrained(folder)` has the same bits")
def is_saved(folder: Path, place: Path) -> None:
    model = compressed(folder)
    model.save_pretrained(place)
    assert torch.equal(logits(compressed(place)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(place, config=model.config)), logits(model))


@use("`model.base_model.save_pretrained(folder)`", "the blocks alone, for `AutoModel`")
def blocks_are_saved(folder: Path, place: Path) -> None:
    model = compressed(folder)
    model.base_model.save_pretrained(place)
    found = AutoModel.from_pretrained(place)(IDS).last_hidden_state
    assert torch.equal(found, model.base_model(IDS).last_hidden_state)


@use(
    "modules replaced, narrowed, removed, shared or untied, then `model.save_pretrained(folder)`",
    "the same bits again where `model.config` says the same; else one sentence, and nothing is written",
)
def changed_models_are_saved_or_refused(folder: Path, place: Path) -> None:
    model = compressed(folder)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)
    model.lm_head = nn.Linear(32, 264, bias=False)
    with pytest.raises(InputError, match="the model is not saved.* set model.config.tie_word_embeddings to False"):
        model.save_pretrained(place / "saved")
    assert not (place / "saved").exists()
    model.config.tie_word_embeddings = False
    model.save_pretrained(place / "saved")
    assert torch.equal(logits(compressed(place / "saved")), logits(model))


@use(
    "`model.resize_token_embeddings(n)`",
    "nothing if the table has `n` rows; else table and head become dense, in the model's dtype, and are resized",
)
def tables_are_resized(folder: Path, place: Path) -> None:
    for rows in (300, 260):
        model, dense = both(folder)
        expected = logits(model)
        model.resize_token_embeddings(264)
        model.resize_token_embeddings(pad_to_multiple_of=8)
        assert isinstance(model.get_input_embeddings(), CompressedEmbedding) and torch.equal(logits(model), expected)
        torch.manual_seed(0)
        dense.resize_token_embeddings(rows)
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=r"embed_tokens, lm_head are dense from now on, in torch\.float32"):
            model.resize_token_embeddings(rows)
        near(logits(model), logits(dense))
        assert logits(model).shape[-1] == rows and isinstance(model.model.layers[0].mlp.up_proj, CompressedLinear)
        model.save_pretrained(place / str(rows))
        assert torch.equal(logits(compressed(place / str(rows))), logits(model))
    model = by_peft(compressed(folder), LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.resize_token_embeddings(264)
    with pytest.raises(InputError, match="cannot be resized with an adapter; do so before it is made"):
        model.resize_token_embeddings(300)


# --- adapters -------------------------------------------------------------------------------------------------------


@use(
    "`get_peft_model(model, LoraConfig(...))`, on linears, the token table and the head",
    "trains, saves and loads as on the dense model; the payload of a table is not saved beside it",
)
def lora_trains(folder: Path, place: Path) -> None:
    for number, targets in enumerate(
        [TARGETS, "all-linear", ["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]]
    ):
        model, dense = adapted(folder, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        same_training(model, dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(logits(reloaded(folder, model, place / str(number))), logits(model))
        assert all("lora_" in name for name in peft.load_peft_weights(str(place / str(number))))


OTHER_ADAPTERS: dict[str, Any] = {
    "DoRA": LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "rsLoRA": LoraConfig(r=2, target_modules=TARGETS, use_rslora=True),
    "AdaLoRA": peft.AdaLoraConfig(total_step=10, target_modules=TARGETS),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "C3A": peft.C3AConfig(block_size=4, target_modules=TARGETS),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LN tuning": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "MiSS": peft.MissConfig(r=2, target_modules=TARGETS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "RandLoRA": peft.RandLoraConfig(r=2, target_modules=TARGETS),
    "VeRA": peft.VeraConfig(r=2, target_modules=["q_proj"]),
}


@use(f"`get_peft_model` with {', '.join(OTHER_ADAPTERS)}, on linears", "trains as on the dense model")
def other_adapters_train(folder: Path, place: Path) -> None:
    for config in OTHER_ADAPTERS.values():
        same_training(*adapted(folder, config))


PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@use(f"`get_peft_model` with {', '.join(PROMPTS)}", "trains, saves and loads as on the dense model")
def prompts_train(folder: Path, place: Path) -> None:
    for name, config in PROMPTS.items():
        model, dense = adapted(folder, config)
        same_training(model, dense)
        near(logits(reloaded(folder, model, place / name)), logits(model))


NEED_THE_MATRIX: dict[str, Any] = {
    "PiSSA": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"),
    "OLoRA": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="olora"),
    "CorDA": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda"),
    "MiCA": LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights="mica"),
    "LoftQ": LoraConfig(
        r=2, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)
    ),
    "LoHa": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "HRA": peft.HRAConfig(r=2, target_modules=TARGETS),
    "SHiRA": peft.ShiraConfig(r=2, target_modules=TARGETS),
    "DoRA on the token table": LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[1, 2]),
}


@use(f"`get_peft_model` with {', '.join(NEED_THE_MATRIX)}", "refused in one sentence; the model stays as it was")
def adapters_that_need_the_matrix_are_refused(folder: Path, place: Path) -> None:
    model = compressed(folder)
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    for name, config in NEED_THE_MATRIX.items():
        for attach in (by_peft, by_transformers):
            fresh = copy.deepcopy(model)
            with pytest.raises(
                InputError, match=r"PEFT cannot put .* on compressed layers .*model\.dequantize\(\) first"
            ):
                attach(fresh, config)
            assert [name for name, _ in fresh.named_modules()] == names, name
            assert torch.equal(logits(fresh), expected), name


@use(
    "`modules_to_save`, `trainable_token_indices` of PEFT's configs",
    "dense modules train whole; compressed ones are refused in one sentence, and the model stays as it was",
)
def whole_modules_train_where_they_are_dense(folder: Path, place: Path) -> None:
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["norm"])
    model, dense = adapted(folder, config)
    same_training(model, dense)
    near(logits(reloaded(folder, model, place)), logits(model))
    for refused in (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"]},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ):
        fresh = compressed(folder)
        names = [name for name, _ in fresh.named_modules()]
        sentence = f"{next(iter(refused))}: .* has compressed weights, and codes cannot be trained; adapt it by LoRA"
        with pytest.raises(InputError, match=sentence):
            by_peft(fresh, LoraConfig(r=2, target_modules=TARGETS, **refused))
        assert [name for name, _ in fresh.named_modules()] == names


@use(
    "`model.add_adapter(config)`, `model.load_adapter(folder)`",
    "as `get_peft_model`; `save_pretrained` writes the adapter",
)
def adapters_of_transformers_train(folder: Path, place: Path) -> None:
    config = LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"])
    model, dense = (by_transformers(one, config) for one in both(folder))
    same_training(model, dense)
    model.save_pretrained(place)
    again = compressed(folder)
    again.load_adapter(str(place))
    assert torch.equal(logits(again), logits(model)) and not (place / "model.safetensors").exists()


@use(
    "`lc.fold(model)`",
    "plain LoRA becomes part of the compressed weights, exactly, and what trained beside it takes its place; a head "
    "that was tied to the table has a matrix of its own if one of both was adapted",
)
def adapters_are_folded(folder: Path, place: Path) -> None:
    cases = {
        "linears": {"target_modules": TARGETS, "modules_to_save": ["norm"]},
        "table": {"target_modules": ["embed_tokens"]},
        "head": {"target_modules": ["lm_head"]},
        "both": {"target_modules": ["embed_tokens", "lm_head"], "lora_alpha": 3},
        "tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
    }
    for name, config in cases.items():
        for attach in (by_peft, by_transformers)[: 2 if name == "linears" else 1]:
            model, dense = both(folder)
            table = model.get_input_embeddings().weight.clone()
            model, dense = (attach(one, LoraConfig(r=2, **config)) for one in (model, dense))
            same_training(model, dense)
            folded = lc.fold(model)
            near(logits(folded), logits(dense))
            assert name != "head" or torch.equal(folded.get_input_embeddings().weight, table)
            assert folded.config.tie_word_embeddings == (name == "linears")
            target = place / f"{name}-{attach.__name__}"
            folded.save_pretrained(target)
            assert torch.equal(logits(compressed(target)), logits(folded))
            assert not any("lora" in key for key, _ in folded.named_parameters())


@use(
    "`merge_and_unload()`, `merge_adapter()` of PEFT",
    "refused in one sentence, since codes cannot take a merge; `lc.fold` can",
)
def merges_are_refused(folder: Path, place: Path) -> None:
    for targets in (TARGETS, ["embed_tokens"]):
        model, _ = adapted(folder, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        expected = logits(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(InputError, match=r"PEFT cannot merge an adapter into model\.\S+, which is compressed"):
                merge()
        assert torch.equal(logits(model), expected)


# --- trainers -------------------------------------------------------------------------------------------------------


def settings(kind: Any, place: Path, **more: Any) -> Any:
    return kind(
        str(place),
        max_steps=2,
        learning_rate=0.05,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


@use("`Trainer(model, ...)` without an adapter", "evaluates; `train()` is refused in one sentence")
def trainers_evaluate(folder: Path, place: Path) -> None:
    model, dense = both(folder)
    rows: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    found, expected = (
        Trainer(one, settings(TrainingArguments, place), eval_dataset=rows).evaluate() for one in (model, dense)
    )
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, settings(TrainingArguments, place), train_dataset=rows).train()


@use(
    "`SFTTrainer(model, peft_config=LoraConfig(...))` of TRL",
    "trains and evaluates as on the dense model; the head is decoded while it runs, since TRL multiplies by its matrix",
)
def trl_trains(folder: Path, place: Path) -> None:
    rows = Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4)
    trained = []
    for model in both(folder):
        head = model.lm_head
        trainer = SFTTrainer(
            model,
            args=settings(SFTConfig, place),
            train_dataset=rows,
            eval_dataset=rows,
            peft_config=LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"], task_type="CAUSAL_LM"),
            processing_class=load_tokenizer(folder),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert model.lm_head is head
        trained.append((trainer.model, before, trainer.evaluate()["eval_loss"]))
    (model, *losses), (dense, *expected) = trained
    assert losses == pytest.approx(expected, rel=1e-4) and losses[1] < losses[0]
    near(logits(model), logits(dense))


@use("`DPOTrainer(...)`, `GRPOTrainer(...)` of TRL", "the same")
def trl_trains_by_preferences(folder: Path, place: Path) -> None:
    pairs = Dataset.from_list([{"prompt": "The mill", "chosen": " grinds", "rejected": " is a goose"}] * 4)
    prompts = Dataset.from_list([{"prompt": "The mill"}] * 4)
    reward = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    asked = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4, "beta": 0.1}
    for trainer, kind, more, how, rows in (
        (DPOTrainer, DPOConfig, {}, {}, pairs),
        (GRPOTrainer, GRPOConfig, reward, asked, prompts),
    ):
        trained = []
        for model in both(folder):
            torch.manual_seed(0)
            run = trainer(
                model,
                args=settings(kind, place, **how),
                train_dataset=rows,
                peft_config=LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
                processing_class=load_tokenizer(folder),
                **more,
            )
            run.train()
            trained.append(logits(run.model))
        near(*trained)
        assert not torch.allclose(trained[0], logits(compressed(folder)), atol=1e-3)


@use("`prepare_model_for_kbit_training(model)`, `model.gradient_checkpointing_enable()`", "as on the dense model")
def gradients_are_checkpointed(folder: Path, place: Path) -> None:
    found = []
    for model in both(folder):
        ready = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        found.append(by_peft(ready, LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"])))
    same_training(found[0].train(), found[1].train())


SLOW = {
    *("trl_trains", "trl_trains_by_preferences", "is_one_program", "other_adapters_train", "prompts_train"),
    "adapters_are_folded",  # plain ones are in tests/models/test_lora.py
}


def cases() -> list[Any]:
    """Every use with either family; those with the second are nightly."""
    found = []
    for family in FAMILIES:
        for case in USES:
            name = case.shown.__name__
            marks = [pytest.mark.slow] * (name in SLOW) + [pytest.mark.nightly] * (family != FAMILIES[0])
            found.append(pytest.param(case, family, id=f"{name}-{family}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case, family", cases())
def test_a_use(case: Use, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case.shown(folders[family], tmp_path)


def test_the_page_lists_these_uses_and_no_others() -> None:
    rows = re.findall(r"^\| (?!you do|---)(.+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    expected = "\n".join(f"| {case.call} | {case.outcome} |" for case in USES)
    assert rows == [(case.call, case.outcome) for case in USES], f"let {PAGE} list these:\n{expected}"
