"""Teachers that only the arena knows."""

from __future__ import annotations

from pathlib import Path

import candidate_teachers
import pytest
import torch
from torch import nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.run import distill
from llmcompress.distillation.teacher.predictions import Online
from tests.distillation.miniature import make, recipe
from tests.tiers import tiered_nightly
from tests.tiny import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("teachers"), [{"match": "*", "steps": [{"method": "rtn", "bits": 3}]}])


def test_probabilities_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, other = (torch.randn(4, 5, generator=generator) for _ in range(3))
    both = candidate_teachers.Both(Online(hidden, head), Online(hidden, other))
    found = both.beside(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), slice(1, 3))["whole"].teacher.exp()
    wanted = (nn.functional.softmax(hidden @ head.T, -1) + nn.functional.softmax(hidden @ other.T, -1))[1:3] / 2
    torch.testing.assert_close(found, wanted)
    assert len(both) == 4 and both.vocabulary() == 4


def test_the_past_is_a_moving_average() -> None:
    teacher, student = tiny("llama"), tiny("llama", seed=1)
    taught = candidate_teachers.BesideItsPast(teacher, student, decay=0.75)
    batch = Batch.of(torch.arange(12).reshape(2, 6))
    wanted = student.lm_head.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            student.lm_head.weight.add_(float(step))
        wanted = 0.75 * wanted + 0.25 * student.lm_head.weight.detach()
        both = taught.predictions(batch)
        torch.testing.assert_close(both.second.head.weight, wanted)
        assert both.first.head is teacher.lm_head
    assert student.lm_head.weight.requires_grad and not both.second.head.weight.requires_grad


@pytest.mark.parametrize("second", tiered_nightly(["past", "small", None], "past".__eq__))
def test_students_learn_from_both(place: Path, tmp_path: Path, second: str | None) -> None:
    folder = place / second if second == "small" else second
    with candidate_teachers.beside(folder):
        done = distill(place / "small", place / "dense", recipe(place, steps=8), tmp_path / "out")
    assert done.history[-1]["kl"] < done.history[0]["kl"]
    alone = distill(place / "small", place / "dense", recipe(place, steps=8), tmp_path / "alone")
    assert (alone.history[-1]["kl"] == done.history[-1]["kl"]) == (second is None)
