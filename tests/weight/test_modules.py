"""A compressed linear among other modules: loading, casting, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.kernels.accelerate import plain
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.layout import Layout
from llmcompress.weight.modules import CompressedLinear, compressed_linears, put
from llmcompress.weight.nodes import Weight, children
from llmcompress.weight.trainable.relax import KINDS, Relaxation, RelaxedLinear
from tests.builders import every_node
from tests.tiny import save_tiny

RECIPE = {
    "version": 1,
    "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 3}, {"method": "svd", "rank": 2}]}],
}


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return lc.compress(save_tiny("llama", tmp_path / "dense"), RECIPE, tmp_path / "out").model


@pytest.mark.parametrize("w", every_node(), ids=describe)
def test_a_layer_holds_any_expression(w: object) -> None:
    layer = CompressedLinear.of(w, torch.arange(float(dense(w).shape[0])))
    layout = Layout.from_json(layer.layout.to_json())
    again = CompressedLinear(layout, torch.zeros(layout.bytes(), dtype=torch.uint8), torch.zeros_like(layer.bias))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(w), layer.bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(again(x), layer(x))
    with lc.decoded(nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), again(x), rtol=1e-4, atol=1e-4)


def leaves(w: Weight) -> list[Weight]:
    return [leaf for _, node, _ in children(w) for leaf in leaves(node)] or [w]


def test_layers_are_decoded_in_the_dtype_of_the_model(model: PreTrainedModel) -> None:
    model = model.to(torch.bfloat16)
    ids = torch.arange(12)[None]
    with plain(model), torch.no_grad():
        wanted = model(ids).logits
    with lc.decoded(model), torch.no_grad():
        layers = compressed_linears(model).values()
        assert all(part.values.dtype == torch.bfloat16 for layer in layers for part in leaves(layer.ready))
        assert torch.equal(model(ids).logits, wanted)
    assert all(layer.ready is None for layer in layers)


def test_casting_a_model_leaves_the_payload_as_it_is(model: PreTrainedModel) -> None:
    before = {name: layer.payload() for name, layer in compressed_linears(model).items()}
    model.to(torch.bfloat16).to(torch.float32)
    for name, layer in compressed_linears(model).items():
        for key, tensor in layer.payload().items():
            assert tensor.dtype == before[name][key].dtype and torch.equal(tensor, before[name][key])


def test_a_saved_model_loads_again(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, layer in compressed_linears(again).items():
        for key, tensor in layer.payload().items():
            assert torch.equal(tensor, compressed_linears(model)[name].payload()[key])


def test_without_our_config_loading_fails_instead_of_inventing_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    """Every payload lies under the dense weight's name with another shape, which stock loaders refuse.

    `tests/models/test_ecosystem.py` loads one where llmcompress is not installed.
    """
    config = tmp_path / "out" / "config.json"
    values = json.loads(config.read_text())
    del values["quantization_config"]  # as transformers advises where it does not know the format
    config.write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nothing_of_a_compressed_layer_asks_for_gradients(model: PreTrainedModel) -> None:
    assert not any(p.requires_grad for layer in compressed_linears(model).values() for p in layer.parameters())


def test_put_names_a_missing_module() -> None:
    with pytest.raises(AttributeError):
        put(nn.Sequential(nn.Linear(2, 2)), "1", nn.Identity())


def test_a_model_trains_relaxed_and_goes_back(model: PreTrainedModel, tmp_path: Path) -> None:
    """Into the dense teacher's direction: latents, scales and low-rank factors of every layer, checkpointing blocks."""
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens = torch.arange(48).reshape(3, 16)
    with torch.no_grad():
        wanted, given = teacher(tokens).logits, model(tokens).logits
    layouts = {name: layer.layout for name, layer in compressed_linears(model).items()}
    for name, layer in compressed_linears(model).items():
        put(model, name, RelaxedLinear.of(layer, Relaxation(frozenset(KINDS)), teacher.get_submodule(name).weight))
    torch.testing.assert_close(model(tokens).logits, given, rtol=1e-5, atol=1e-5)  # BLAS may sum in another order

    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    relaxed = {name: module for name, module in model.named_modules() if isinstance(module, RelaxedLinear)}
    optimizer = torch.optim.Adam([p for module in relaxed.values() for p in module.parameters()], lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(tokens).logits - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]

    model.eval()
    trained = model(tokens).logits
    for name, module in relaxed.items():
        put(model, name, module.freeze())
    torch.testing.assert_close(model(tokens).logits, trained, rtol=1e-5, atol=1e-5)
    stored = model(tokens).logits
    assert {name: layer.layout for name, layer in compressed_linears(model).items()} == layouts
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")  # multiplies by kernels
    torch.testing.assert_close(again(tokens).logits, stored, rtol=1e-4, atol=1e-4)
