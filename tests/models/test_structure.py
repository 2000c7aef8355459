"""Models whose blocks differ in width, or that have fewer of them: the table in config.json says what is where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.evaluation.verify import verify
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig, table_entry
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear, compressed_linears, put
from llmcompress.weight.nodes import Grid
from tests.tiny import save_tiny, tiny_tokenizer

RECIPE = {
    "version": 1,
    "rules": [{"match": "*.0.mlp.*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}],
}
IDS = torch.arange(20)[None] * 7 % 256


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return lc.compress(save_tiny("llama", tmp_path / "dense"), RECIPE, tmp_path / "out").model


def columns(w: Grid, count: int) -> Grid:
    return Grid(w.codes[:, :count], w.scale[:, : count // w.group_size], w.zero, w.levels, w.group_size)


def rows(w: Grid, count: int) -> Grid:
    return Grid(w.codes[:count], w.scale[:count], w.zero, w.levels, w.group_size)


def narrow(model: PreTrainedModel) -> dict[str, list[int]]:
    """Compressed MLP of block 0: 32 of 48 channels. Dense MLP of block 1: 24. Attention of block 1: one query head for
    each of its two key heads. Returns the sizes of the dense ones."""
    for name, layer in compressed_linears(model).items():
        cut = columns(layer.expression(), 32) if name.endswith("down_proj") else rows(layer.expression(), 32)
        put(model, name, CompressedLinear.of(cut))
    block = model.model.layers[1]
    keep = torch.tensor([*range(8), *range(16, 24)])  # heads 0 and 2 of width 8
    for name, rows_kept, columns_kept in (
        ("mlp.gate_proj", torch.arange(24), None),
        ("mlp.up_proj", torch.arange(24), None),
        ("mlp.down_proj", None, torch.arange(24)),
        ("self_attn.q_proj", keep, None),
        ("self_attn.o_proj", None, keep),
    ):
        weight = block.get_submodule(name).weight.detach()
        weight = weight if rows_kept is None else weight[rows_kept]
        weight = weight if columns_kept is None else weight[:, columns_kept]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        put(block, name, linear)
    block.self_attn.num_key_value_groups = 1
    linears = {f"model.layers.1.{name}": module for name, module in block.named_modules()}
    return {name: [m.out_features, m.in_features] for name, m in linears.items() if isinstance(m, nn.Linear)}


def save(model: PreTrainedModel, sizes: dict[str, list[int]], folder: Path) -> Path:
    table = {name: layer.layout for name, layer in compressed_linears(model).items()}
    model.config.quantization_config = LLMCompressConfig(**table_entry(table, sizes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_unequal_widths_are_saved_and_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(model, narrow(model), tmp_path / "narrow")
    again: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert again.model.layers[0].mlp.up_proj.out_features == 32 and again.model.layers[1].mlp.up_proj.out_features == 24
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    written, slow = (again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(written, slow)
    (tmp_path / "text.txt").write_text("Forty farms bring their corn to the mill by the river. " * 9)
    assert verify(folder, text=tmp_path / "text.txt", length=16).layers == 3
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_a_model_of_unequal_widths_is_saved_and_loaded_once_it_is_dense(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(model, narrow(model), tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not compressed_linears(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not compressed_linears(again)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_fewer_blocks_are_saved_and_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    again = AutoModelForCausalLM.from_pretrained(save(model, {}, tmp_path / "short"))
    assert len(again.model.layers) == 1 and torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "name, size, sentence",
    [
        ("model.layers.1.mlp.up_proj", [20, 32], "sizes that do not fit each other"),
        ("model.layers.1.mlp.gate_proj", [1, 32], "sizes that do not fit each other"),
        ("model.layers.1.mlp.middle_proj", [20, 32], "which is no matrix of a LlamaForCausalLM"),
        ("model.embed_tokens", [20, 32], "the size .20, 32., which it does not have"),
    ],
)
def test_impossible_sizes_are_refused(
    name: str, size: list[int], sentence: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save(model, narrow(model), tmp_path / "narrow")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sizes"][name] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_narrow_grid_is_what_was_kept(model: PreTrainedModel) -> None:
    whole = dense(compressed_linears(model)["model.layers.0.mlp.down_proj"].expression())
    narrow(model)
    kept = dense(compressed_linears(model)["model.layers.0.mlp.down_proj"].expression())
    assert torch.equal(kept, whole[:, :32])
