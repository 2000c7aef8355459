"""The walk against the model's own forward: it must see, block by block, exactly what the unedited model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.architecture import FAMILIES, Architecture, architecture
from llmcompress.calibrate import walk
from llmcompress.source import Source, resolve
from tests.tiny import save_tiny, tiny

DISCOVERED = ["stablelm", "starcoder2", "olmo2", "granite", "cohere", "helium"]  # families without a row
OUTER = frozenset({"outer"})


def sequences(count: int = 5, length: int = 24) -> Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Source, Architecture]]:
    """Tiny models on disk, one per family."""
    made: dict[str, tuple[Source, Architecture]] = {}

    def get(family: str) -> tuple[Source, Architecture]:
        if family not in made:
            source = resolve(str(save_tiny(family, tmp_path_factory.mktemp(family), **changes(family))))
            made[family] = source, architecture(source.config, source.skeleton())
        return made[family]

    return get


def changes(family: str) -> dict[str, Any]:
    """Settings for model types that `tiny` has no row for."""
    if family not in DISCOVERED:
        return {}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def block_outputs(model: PreTrainedModel, arch: Architecture, tokens: Tensor) -> list[Tensor]:
    """What every block of the plain model returns for one batch."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(layout.path).register_forward_hook(lambda _m, _a, output: seen.append(output))
        for layout in arch.blocks
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def linear_inputs(model: PreTrainedModel, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """The inputs `[tokens, in]` of linears in the plain model."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", [*FAMILIES, *DISCOVERED])
def test_walk_reproduces_hidden_states(family: str, opened: Callable[[str], tuple[Source, Architecture]]) -> None:
    source, arch = opened(family)
    assert (arch.family is None) == (family in DISCOVERED)
    tokens, plain = sequences(), tiny(family, **changes(family))
    batches = [slice(0, 2), slice(2, 3), slice(3, 5)]  # batch size 2, the last two sequences held out
    expected = [block_outputs(plain, arch, tokens[rows]) for rows in batches]
    block = None
    for block in walk(source, arch, tokens, held_out=2, needs=OUTER, batch_size=2):
        if block.index:
            for rows, outputs in zip(batches, expected, strict=True):
                assert (block.hidden[rows] - outputs[block.index - 1]).abs().max() == 0
    assert block is not None
    for rows, outputs in zip(batches, expected, strict=True):  # after the last block
        assert (block.hidden[rows] - outputs[-1]).abs().max() == 0
