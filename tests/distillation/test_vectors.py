"""Steps of vectors: each number moves by the rate times its own size, where it multiplies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmcompress.distillation.student.model import (
    FLOOR,
    NORMS,
    Student,
    find_offsets,
    number_sizes,
    relaxed_student,
)
from tests.distillation.miniature import loaded, make
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, tiny

RTN = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]


@pytest.mark.parametrize("family", tiered(sorted(FAMILY_CONFIGS), {"gemma3_text", "llama", "gpt2"}.__contains__))
def test_offsets_make_fresh_gains_one(family: str) -> None:
    """A model begins with gains that multiply by 1, however they are stored."""
    model = tiny(family)
    offsets = find_offsets(model, [name for name, _ in model.named_parameters()])
    norms = [(name, module) for name, module in model.named_modules() if "Norm" in type(module).__name__]
    for name, module in norms:
        if isinstance(gains := getattr(module, "weight", None), torch.Tensor):
            fresh = gains.detach().mean() + offsets.get(f"{name}.weight", 0.0)
            assert float(fresh) == pytest.approx(1, abs=0.5), name
    assert norms and set(offsets.values()) <= {1.0}


def test_sizes() -> None:
    vector = torch.tensor([-1.0, -0.9, 499.0, 0.0])
    root = float((vector.double() + 1).square().mean().sqrt())
    assert number_sizes(vector, 1.0).tolist() == pytest.approx([FLOOR * root, FLOOR * root, 500, 1])
    assert number_sizes(torch.zeros(3), 0.0).tolist() == [1, 1, 1]


def test_vectors_are_noted_in_the_order_in_which_they_train(tmp_path: Path) -> None:
    """Not in that of a set of strings, which each process has its own of: their means are exchanged one by one."""
    make(tmp_path, RTN)
    whole: Student = relaxed_student(loaded(tmp_path)[0], {"scales": 0.01, "norms": 0.01})
    for order in (("scales", "norms"), ("norms", "scales")):
        student = replace(whole, trained={kind: whole.trained[kind] for kind in order}, held={})
        student.hold()
        assert list(student.held) == [name for kind in order for name in student.trained[kind]]


def test_each_number_moves_in_proportion_to_its_size(tmp_path: Path) -> None:
    """The first step of Adam is the rate, in the direction of the gradient."""
    make(tmp_path, RTN)
    model, _ = loaded(tmp_path)
    student: Student = relaxed_student(model, {"scales": 0.01, "norms": 0.01})
    norms = student.trained[NORMS]
    for seed, value in enumerate(norms.values()):  # as unlike as those of Gemma
        value.data *= 10 ** torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    before = {name: value.detach().clone() for name, value in student.named_parameters().items()}
    optimizer = torch.optim.Adam([{**group, "lr": 0.01 * group["size"]} for group in student.groups()], eps=1e-30)
    model(torch.arange(16)[None]).logits.square().mean().backward()
    student.hold()
    optimizer.step()
    student.settle()
    moved = {name: (value.detach() - before[name]).abs() for name, value in student.named_parameters().items()}
    assert {name for name, change in moved.items() if change.any()} == before.keys()
    for name, change in moved.items():
        sizes = number_sizes(before[name], 0.0)
        assert torch.allclose(change[change > 0], 0.01 * sizes[change > 0], rtol=1e-2), name
