"""`save_pretrained` of a compressed model, whatever was done to it, writes what loads to the same bits, or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.verify import UNCHECKED, verify
from llmcompress.models.files.checkpoint import add_file, check_can_add
from llmcompress.models.files.file_names import RECIPE, REPORT, SCORES
from llmcompress.models.files.integrity import weight_files
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Dense
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, save_tiny
from tests.zoo import HYBRIDS, MIXTURES, PLAIN, save_any

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]}]
IDS = torch.arange(30)[None] * 7 % 256
Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saving")
    source = save_tiny("llama", place / "dense", tie_word_embeddings=True)
    embeddings = [{"method": "rtn", "bits": 4}]
    return lc.compress(source, {"version": 1, "rules": RULES, "embeddings": embeddings}, place / "out").folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias)


def nothing(model: Any) -> None:
    pass


def dense_linear(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = linear(32, 32)


def narrow_block(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = linear(32, 40), linear(32, 40), linear(40, 32)


def other_form(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = CompressedLinear.of(Dense(linear(32, 48).weight.detach().half()))


def own_head(model: Any) -> None:
    model.lm_head = linear(32, 264)
    model.config.tie_word_embeddings = False


def own_compressed_head(model: Any) -> None:
    model.lm_head = CompressedLinear.of(Dense(linear(32, 264).weight.detach()))
    model.config.tie_word_embeddings = False


def head_that_config_forgets(model: Any) -> None:
    model.config.tie_word_embeddings = False


def one_linear_twice(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def one_payload_twice(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def dense_weight_twice(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm.weight
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight = norm


def fewer_blocks(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def trained_norm(model: Any) -> None:
    model.model.norm.weight.data.mul_(1.5)


def all_dense(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear) and name != "lm_head":
            plain = nn.Linear(module.in_features, module.out_features, False)
            plain.weight.data = module.dequantize()
            model.set_submodule(name, plain)


RIGHT: list[Change] = [
    nothing,
    dense_linear,
    narrow_block,
    other_form,
    own_head,
    own_compressed_head,
    head_that_config_forgets,
    one_linear_twice,
    one_payload_twice,
    dense_weight_twice,
    fewer_blocks,
    trained_norm,
    all_dense,
]


@pytest.mark.parametrize("change", tiered(RIGHT, RIGHT[::2].__contains__, lambda change: change.__name__))
def test_what_is_saved_loads_to_the_same_bits(change: Change, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    expected = logits(model)
    assert change in (nothing, head_that_config_forgets, all_dense) or not torch.equal(
        expected, logits(AutoModelForCausalLM.from_pretrained(folder))
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected) and torch.equal(logits(model), expected)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "family",
    tiered(
        [*FAMILY_CONFIGS, *MIXTURES, *HYBRIDS, *PLAIN],
        {"gpt2", "mixtral", "olmo_hybrid"}.__contains__,
        slow=FAMILY_CONFIGS.__contains__,
    ),
)
def test_every_family_is_saved_in_the_type_it_has(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where a class keeps some weights in float32."""
    compressed = lc.compress(save_any(family, tmp_path / "dense"), {"version": 1, "rules": RULES}, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, dtype=dtype)
    expected = logits(model)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


def test_a_part_of_a_model_is_saved(folder: Path, tmp_path: Path) -> None:
    """The blocks alone; the whole model is saved as before."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
    model.model.save_pretrained(tmp_path / "blocks")
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "blocks")(IDS).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(model))


def test_the_blocks_of_a_mixture_are_saved(tmp_path: Path) -> None:
    """By the names that they have in memory, not by those of the Hub."""
    source = save_any("mixtral", tmp_path / "dense")
    folder = lc.compress(source, {"version": 1, "rules": RULES}, tmp_path / "out").folder
    blocks: Any = AutoModelForCausalLM.from_pretrained(folder).base_model
    blocks.save_pretrained(tmp_path / "blocks")
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "blocks")(IDS).last_hidden_state
        assert torch.equal(found, blocks(IDS).last_hidden_state)


def test_a_model_is_saved_over_its_own_folder(folder: Path, tmp_path: Path) -> None:
    """In one file or in several; nothing stays of what was there, nor of what was measured of it."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    add_file(own, SCORES, "{}")
    for size in ("8KB", "4KB", "1GB"):
        model = AutoModelForCausalLM.from_pretrained(own)
        trained_norm(model)
        expected = logits(model)
        model.save_pretrained(own, max_shard_size=size)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(own)), expected)
        assert (len(weight_files(own)) > 1) == (size != "1GB")
        assert not {SCORES, REPORT} & set(os.listdir(own)) and (own / RECIPE).is_file()
    (own / REPORT).write_text("{}")
    model.save_pretrained(own)
    assert (own / REPORT).is_file(), "somebody else's, in a folder without a manifest"


def test_a_model_is_pushed_over_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """As `push_to_hub` does, which adds files and removes none: what stays tells nothing of the new weights."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    own_compressed_head(model)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", own, dirs_exist_ok=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(own)), logits(model))
    assert verify(own).notes == (UNCHECKED,)
    with pytest.raises(RecipeError, match="results are kept in no other"):
        check_can_add(own)
    with pytest.raises(InputError, match="push a folder that compress wrote"):
        lc.push(own, "me/small", dry_run=True)


def test_tensors_that_the_model_has_not_are_not_saved(folder: Path, tmp_path: Path) -> None:
    """Those that it has may be given, as accelerate gives them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "same", state_dict=own)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "same")), logits(model))
    for other in ({"model.norm.weight": own["model.norm.weight"] * 2}, {"model.more.weight": torch.ones(2)}):
        with pytest.raises(InputError, match=rf"state_dict has another {next(iter(other))}.*load_state_dict"):
            model.save_pretrained(tmp_path / "other", state_dict=own | other)
    assert not (tmp_path / "other").exists()


class Doubled(nn.Linear):
    """A linear of another kind with the same tensors."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def other_kind(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = Doubled(32, 32, False)


def wrapped(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)


def more_bias(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = linear(32, 32, bias=True)


def fewer_blocks_untold(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def other_width(model: Any) -> None:
    model.config.hidden_size = 64


def no_config(model: Any) -> None:
    model.config.num_attention_heads = 0


def misfit(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = linear(32, 40)


def head_untold(model: Any) -> None:
    model.lm_head = linear(32, 264)


def matrix_in_payload(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(48, 32)


def cut_payload(model: Any) -> None:
    up = model.model.layers[0].mlp.up_proj
    up.weight.data = up.weight.data[:-8]


def not_a_number(model: Any) -> None:
    model.model.norm.weight.data[3] = torch.nan


def not_a_number_in_payload(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = CompressedLinear.of(Dense(torch.full((48, 32), torch.inf)))


def two_types(model: Any) -> None:
    model.model.norm.to(torch.bfloat16)


def rows_scaled(model: Any) -> None:
    model.model.embed_tokens.scale = 3.0


def adapted(model: Any) -> None:
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


REFUSED: dict[Change, str] = {
    other_kind: r"q_proj is a Doubled where a load would make it a Linear; put back",
    wrapped: r"layers\.0\.self_attn\.q_proj is a Sequential where a load would make it a Linear",
    more_bias: r"q_proj\.bias has no place in the model that is loaded",
    fewer_blocks_untold: r"model\.layers\.1 is missing where a load would make it a LlamaDecoderLayer",
    other_width: r"config\.json gives model\.embed_tokens the size \[264, 32\], which it does not have; put back",
    no_config: r"its config describes no model",
    misfit: r"config\.json gives gate_proj and up_proj of .* sizes that do not fit each other",
    head_untold: r"lm_head\.weight is no longer model\.embed_tokens\.weight.*set model\.config\.tie_word_embeddings",
    matrix_in_payload: r"up_proj\.weight is torch\.float32 \[48, 32\] where a load asks for U8 \[\d+\]",
    cut_payload: r"up_proj\.weight is torch\.uint8 \[\d+\] where a load asks for U8 \[\d+\]",
    not_a_number: r"model\.norm\.weight holds NaN or Inf",
    not_a_number_in_payload: r"up_proj\.weight holds NaN or Inf",
    two_types: r"model\.norm\.weight is torch\.bfloat16, and a load gives it torch\.float32 .*model\.to\(dtype\)",
    rows_scaled: r"embed_tokens multiplies rows by 3\.0, not as its config says",
    adapted: r"q_proj holds an adapter of PEFT; make it part of the model by llmcompress\.fold",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_not_load_is_not_written(change: Change, folder: Path, tmp_path: Path) -> None:
    """In one sentence, before the first byte; the model is as it was before the attempt."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    config = model.config.quantization_config
    with pytest.raises(
        InputError, match=f"the model is not saved, as a load would not give it back: .*{REFUSED[change]}"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() and model.config.quantization_config is config


def test_a_matrix_in_common_must_be_there(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    model: Any = lc.compress(source, {"version": 1, "tie": {"blocks": 1}, "rules": RULES}, tmp_path / "out").model
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)
    parent, _, leaf = next(iter(model.config.quantization_config.ties.values())).rpartition(".")
    delattr(model.get_submodule(parent), leaf)
    with pytest.raises(InputError, match="a matrix that several linears have in common was taken off"):
        model.save_pretrained(tmp_path / "again")


def test_other_models_are_saved_as_ever(folder: Path, tmp_path: Path) -> None:
    """Dense ones, and those of other quantizers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="another"))
    with pytest.raises(ValueError, match="quantized with another and is not serializable"):
        model.save_pretrained(tmp_path)
