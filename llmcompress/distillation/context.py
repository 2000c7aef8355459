"""The context of a training: everything it reads and changes, as one value that its parts take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate import Accelerator

from llmcompress.data.distillation import Data
from llmcompress.distillation.metrics import Metrics
from llmcompress.distillation.student.model import Student
from llmcompress.distillation.teacher.predictions import ReadsAlong, Teaching
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import Distillation
from llmcompress.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Report = Callable[[int, int, float, float, float], None]  # (steps done, steps, loss, tokens per second, last KL)


@dataclass(frozen=True, eq=False)
class TrainContext:
    """Everything a training reads and changes."""

    recipe: Distillation
    student: Student
    teacher: PreTrainedModel  # for a look at the held-out sequences
    dense: Callable[[], PreTrainedModel]  # gives the teacher, where its weights are asked for
    teaching: Teaching
    data: Data
    store: Store
    accelerator: Accelerator
    metrics: Metrics
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    ranks: Ranks = ALONE

    @property
    def reader(self) -> PreTrainedModel:
        """The model that reads along; without one, the teacher for looks at the held-out sequences."""
        return self.teaching.model if isinstance(self.teaching, ReadsAlong) else self.teacher

    @property
    def steps(self) -> int:
        """The number of optimizer steps in all."""
        return self.recipe.steps or max(1, len(self.data.sequences) // self.recipe.batch)
