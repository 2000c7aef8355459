"""Blocks that are read ahead are those that are read when they are needed, errors included, and one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.blocks import Prefetcher, prefetching
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Execution, walk
from llmcompress.compression.job import prepare
from llmcompress.compression.memory_estimate import LIBRARIES
from llmcompress.compression.plan import plan_of
from llmcompress.errors import InputError
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.recipe.read import read_recipe
from tests.tiny import save_tiny

CPU = torch.device("cpu")
BLOCKS = 3


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseModel, Architecture]:
    source = resolve(str(save_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)))
    return source, architecture(source.config, source.skeleton())


def seen(
    opened: tuple[DenseModel, Architecture], with_data: bool, finished: int, read_ahead: bool
) -> list[list[Tensor]]:
    """Return the weights, moments and inputs of each block."""
    tokens = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    found = []
    statistics, execution = Statistics(frozenset({"outer"})), Execution(read_ahead=read_ahead)
    for block in walk(*opened, tokens if with_data else None, statistics, execution, finished=finished):
        moments = [group.inputs.outer for group in block.groups if group.inputs.outer is not None]
        found.append([*(value.clone() for value in block.module.parameters()), *moments, block.hidden.clone()])
    return found


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("finished", [0, 1])
def test_blocks_are_the_same(opened: tuple[DenseModel, Architecture], with_data: bool, finished: int) -> None:
    expected, found = (seen(opened, with_data, finished, ahead) for ahead in (False, True))
    assert len(expected) == len(found) >= BLOCKS - finished
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_no_more_than_one_block_is_ahead(
    opened: tuple[DenseModel, Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every tensor of a block is read once."""
    read: list[str] = []
    original = DenseModel.read

    def counted(source: DenseModel, name: str) -> Tensor:
        read.append(name)
        return original(source, name)

    monkeypatch.setattr(DenseModel, "read", counted)
    for block in walk(*opened, None, execution=Execution(read_ahead=True)):
        there = {int(name.split(".")[2]) for name in list(read) if ".layers." in name}
        assert max(there) <= block.index + 1
    assert len(read) == len(set(read)) and {f"model.layers.{n}.mlp.up_proj.weight" for n in range(BLOCKS)} <= set(read)


def test_only_a_gpu_reads_ahead_unasked(opened: tuple[DenseModel, Architecture]) -> None:
    with prefetching(opened[0], CPU) as ahead:
        assert ahead.pool is None
    with prefetching(opened[0], torch.device("cuda")) as ahead:
        assert ahead.pool is not None and ahead.pinned


def test_an_error_is_that_of_the_block_that_has_it(
    opened: tuple[DenseModel, Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the block before it, while which it was met."""
    original = DenseModel.read

    def damaged(source: DenseModel, name: str) -> Tensor:
        if ".layers.1." in name:
            raise InputError(f"{name} is damaged")
        return original(source, name)

    monkeypatch.setattr(DenseModel, "read", damaged)
    blocks = walk(*opened, None, execution=Execution(read_ahead=True))
    assert next(blocks).index == 0
    with pytest.raises(InputError, match=r"layers\.1\..* is damaged"):
        next(blocks)


def test_a_block_that_was_not_taken_is_not_replaced(opened: tuple[DenseModel, Architecture]) -> None:
    with prefetching(opened[0], CPU, True) as ahead:
        ahead.start(["model.norm.weight"])
        with pytest.raises(ValueError, match="was not taken"):
            ahead.start(["model.norm.weight"])
        assert torch.equal(ahead.take()("model.norm.weight"), opened[0].read("model.norm.weight"))
    Prefetcher(opened[0], None, False).start(["model.norm.weight"])  # nothing is read, and nothing waits


def test_the_estimate_holds_the_block_that_is_ahead(opened: tuple[DenseModel, Architecture]) -> None:
    """A block as it is stored, held for a GPU, is less than what is held of one on the CPU."""
    source, arch = opened
    steps = [{"method": "rtn", "bits": 4}]
    job = prepare(source, read_recipe({"version": 1, "rules": [{"match": "*", "steps": steps}]}))
    block = sum(header.bytes for name, header in source.tensors.items() if name.startswith(f"{arch.blocks[0].path}."))
    assert LIBRARIES + block <= plan_of(job).peak_memory_bytes
