"""The cost of a plan: large models have many matrices, but of few shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmcompress.compression import plan
from llmcompress.compression.job import prepare
from llmcompress.compression.plan import plan_of
from llmcompress.methods.layer import sketch
from llmcompress.models.dense import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.expression import bits
from llmcompress.weight.nodes import shown_count
from tests.tiny import save_tiny

PRUNED = {"method": "magnitude", "sparsity": 0.5}
GRID = {"method": "rtn", "bits": 3, "group_size": 16}
RULES = [{"match": "*.1.mlp.*", "steps": [GRID]}, {"match": "*", "steps": [PRUNED]}]


def test_each_shape_is_sketched_once_for_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=5)
    asked = read_recipe({"version": 1, "name": "two", "rules": RULES})
    job = prepare(resolve(tmp_path), asked)
    linears = job.arch.linears()
    separate = {name: bits(sketch(name, linears[name].shape, steps)) for name, steps in job.steps.items()}
    sketched: list[str] = []

    def counted(name: str, *rest: object) -> object:
        sketched.append(name)
        return sketch(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "sketch", counted)
    assert {row.name: row.bits for row in plan_of(job).layers} == separate
    assert len(sketched) == len({(linears[name].shape, steps) for name, steps in job.steps.items()}) < len(separate)


@pytest.mark.parametrize("shown", [torch.arange(7) % 3 == 0, torch.arange(35).view(5, 7) % 4 == 0])
def test_stored_elements_are_counted_as_a_sum_counts_them(shown: Tensor) -> None:
    assert shown_count(shown, (5, 7)) == int(shown.expand(5, 7).sum())
