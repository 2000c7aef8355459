"""Teachers that the arena (lessons.py) tries before the package offers them: two models whose predictions are averaged.

The second is another model, such as a compressed sibling of the teacher (after MEAL V2, 2009.08453, which averages
several teachers), or the student's own past, the moving average of its weights (after SD-DARTS, whose earlier selves
vote).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation import setup
from llmcompress.distillation.teacher.predictions import Online, OnlineTeacher
from llmcompress.losses.loss import Predictions, Reads
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Both:
    """Predictions of two models on the same tokens: the mean of their probabilities."""

    first: Online
    second: Online

    def __len__(self) -> int:
        return len(self.first)

    def vocabulary(self) -> int:
        """See `TeacherLogits.vocabulary`."""
        return self.first.vocabulary()

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `TeacherLogits.beside`: every kind."""
        one, other = (
            each.beside(student, targets, rows)["whole"].teacher.float().log_softmax(-1)
            for each in (self.first, self.second)
        )
        predictions = Predictions(student, torch.logaddexp(one, other) - math.log(2), targets)
        return {"whole": predictions, "merged": predictions, "nothing": predictions}


@dataclass(frozen=True, eq=False)
class BesideAnother:
    """The teacher and another model read along."""

    models: tuple[PreTrainedModel, PreTrainedModel]

    def predictions(self, batch: Batch) -> Both:
        """See `TeacherSource.predictions`."""
        return Both(*(OnlineTeacher(model).predictions(batch) for model in self.models))


@dataclass(eq=False)
class BesideItsPast:
    """The teacher reads along, and so does the student as it was: the moving average of its weights.

    Each micro-batch counts once: with `decay` 0.9 the average is over some ten of them.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    decay: float = 0.9
    past: list[PreTrainedModel] = field(default_factory=list)  # none before the first step

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Both:
        """See `TeacherSource.predictions`."""
        if not self.past:
            self.past.append(deepcopy(self.student).requires_grad_(False))
        for then, now in zip(self.past[0].parameters(), self.student.parameters(), strict=True):
            if now.requires_grad:
                then.lerp_(now, 1 - self.decay)
        return BesideAnother((self.teacher, self.past[0])).predictions(batch)


@contextmanager
def beside(second: str | Path | None, device: str = "cpu") -> Iterator[None]:
    """Within the context, let distillations learn from the average with a second teacher: a model's folder, or "past";
    None for the teacher alone."""
    if second is None:
        yield
        return

    def choose(_: Any, student: PreTrainedModel, teacher: PreTrainedModel) -> BesideAnother | BesideItsPast:
        if second == "past":
            return BesideItsPast(teacher, student)
        return BesideAnother((teacher, load_model(locate(second), device).requires_grad_(False)))

    with mock.patch.object(setup, "choose_source", choose):
        yield
