"""A mixture that has learned something: which ways of saving experts keep what it knows, on text it has not seen.

Only orders that are far from the noise between seeds are held on to; `research/experts.py` has the numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmcompress as lc
from tests.surgery.experts.trained import BLOCKS, EXPERTS, distance, loaded, predictions, train

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "dense", 0)


@pytest.fixture(scope="module")
def dense(trained: Path) -> Tensor:
    return predictions(loaded(trained))


def test_pruning_by_a_score_is_better_than_at_random(trained: Path, dense: Tensor, tmp_path: Path) -> None:
    def kl(by: str, seed: int = 0) -> float:
        out = tmp_path / f"{by}-{seed}"
        lc.prune_experts(trained, out, keep=EXPERTS // 2, by=by, seed=seed, text="builtin")
        return distance(loaded(out), dense)

    random = [kl("random", seed) for seed in range(5)]
    mean = sum(random) / len(random)
    assert kl("reap") < mean and kl("frequency") < mean


def test_condensing_is_better_than_dropping_the_layer(trained: Path, dense: Tensor, tmp_path: Path) -> None:
    for block in range(BLOCKS):
        lc.condense_experts(trained, tmp_path / f"{block}", blocks=[block], text="builtin")
        without = loaded(trained)
        without.model.layers[block].mlp.forward = torch.zeros_like
        condensed, dropped = distance(loaded(tmp_path / f"{block}"), dense), distance(without, dense)
        assert condensed < dropped


def test_factors_are_better_than_nothing_in_the_same_experts(trained: Path, dense: Tensor, tmp_path: Path) -> None:
    """Of a quarter of their size; the others are zero, and routers still choose them."""
    report = lc.replace_experts(trained, tmp_path / "out", count=EXPERTS // 2, text="builtin")
    without = loaded(trained)
    for block in report.blocks:
        experts = without.get_submodule(block.path)
        for row in block.experts:
            if row.fate == "replaced":
                experts.down_proj.data[row.number] = 0
    replaced, zero = distance(loaded(tmp_path / "out"), dense), distance(without, dense)
    assert replaced < zero
