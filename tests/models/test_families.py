"""The table of families against real models: their linears, and which of them read the same tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.models.dense.experts import experts_of, unfuse
from llmcompress.models.dense.families import FAMILIES, architecture
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, VOCABULARY, tiny
from tests.zoo import COUNT, MIXTURES, zoo

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}


def test_every_row_is_tested() -> None:
    assert FAMILIES.keys() == FAMILY_CONFIGS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_linears_that_read_one_tensor(family: str) -> None:
    """By tensor identity, not equality: attention and MLP may well see equal numbers."""
    model = tiny(family)
    arch = architecture(model.config, model)
    readers: dict[int, tuple[torch.Tensor, list[str]]] = {}  # keeps the tensors, so that ids stay unique

    def remember(name: str, x: torch.Tensor) -> None:
        readers.setdefault(id(x), (x, []))[1].append(name)

    for name in arch.linears():
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: remember(name, args[0]))
    model(torch.arange(12)[None])
    table = [tuple(linear.name for linear in group) for block in arch.blocks for group in block.groups]
    assert sorted(tuple(sorted(names)) for _, names in readers.values()) == sorted(tuple(sorted(row)) for row in table)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_described_as_they_are(family: str) -> None:
    model = tiny(family)
    arch = architecture(model.config, model)
    assert len(arch.blocks) == 2
    assert not arch.other
    assert "lm_head" in [linear.name for linear in arch.outside]
    assert arch.linears() is arch.linears(), "loops over thousands of names ask for them"
    assert arch.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    for name, linear in arch.linears().items():
        module = model.get_submodule(name)
        out, width = linear.shape
        assert module(torch.zeros(1, width)).shape == (1, out)
        assert linear.transposed == (tuple(module.weight.shape) != linear.shape or family == "gpt2")
        assert linear.bias == (module.bias is not None)


@pytest.mark.parametrize("family", ["stablelm", "starcoder2", "olmo2"])
def test_unknown_family_is_understood_by_its_structure(family: str) -> None:
    model = tiny(family, **SMALL)
    arch = architecture(model.config, model)
    assert arch.family is None
    assert arch.stack == "model.layers"
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    assert list(arch.linears()) == inside
    assert all(len(group) == 1 for block in arch.blocks for group in block.groups)


@pytest.mark.parametrize("family", tiered(MIXTURES, {"mixtral", "qwen2_moe", "llama4_text"}.__contains__))
def test_gate_and_up_of_an_expert_are_one_group_and_routers_are_in_none(family: str) -> None:
    model = zoo(family)
    unfuse(model)
    arch = architecture(model.config, model)
    groups = [{linear.name for linear in group} for block in arch.blocks for group in block.groups]
    experts = {f"{path}.{number}" for path, found in experts_of(model).items() for number in range(len(found))}
    assert len(experts) >= COUNT
    for path in experts:
        first = {f"{path}.gate_proj", f"{path}.up_proj"} if family != "nemotron_h" else {f"{path}.up_proj"}
        assert first in groups and {f"{path}.down_proj"} in groups
    together = set().union(*(group for group in groups if len(group) > 1))
    assert all(name.rpartition(".")[0] in experts for name in together)
    routers = {
        name
        for name in model.state_dict()
        if name.endswith((".gate.weight", "shared_expert_gate.weight", "router.weight"))
    }
    assert routers and routers <= set(arch.other)


def test_changed_block_of_a_known_family_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].extra = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"model\.layers\.1 is not the block .*unexpected: model\.layers\.1\.extra"):
        architecture(model.config, model)


def test_ambiguous_structure_is_refused() -> None:
    model = tiny("stablelm", **SMALL)
    model.model.adapters = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(InputError, match=r"'stablelm' .*: 2 lists have the 2 modules .*model\.adapters, model\.layers"):
        architecture(model.config, model)
    del model.model.adapters, model.model.layers
    with pytest.raises(InputError, match="0 lists have the 2 modules"):
        architecture(model.config, model)


def test_blocks_without_linears_are_refused() -> None:
    model = tiny("stablelm", **SMALL)
    model.model.layers[1] = nn.LayerNorm(32)
    with pytest.raises(InputError, match=r"model\.layers\.1 holds no linear layer"):
        architecture(model.config, model)


def test_other_matrices_inside_blocks_are_listed() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.table = nn.Parameter(torch.zeros(VOCABULARY, 2))
    assert architecture(model.config, model).other == ("model.layers.0.mlp.table",)
