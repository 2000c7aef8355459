"""A distillation as values: the job, and the context of its training, which its parts take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from llmcompress.data.distillation import Data
from llmcompress.distillation.metrics import Metrics
from llmcompress.distillation.student.model import Student
from llmcompress.distillation.teacher.predictions import HeldOutTeacher, OnlineTeacher, TeacherSource
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import Distillation
from llmcompress.runtime.precision import product_dtype, products
from llmcompress.runtime.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING = ".training"  # follows the name of the output folder: the state of an interrupted run
Report = Callable[[int, int, float, float, float], None]  # (steps done, steps, loss, tokens per second, last KL)


@dataclass(frozen=True, eq=False)
class DistillationJob:
    """A distillation into the folder `output`. `store`: of its states; `tracked`: True if trackers get its metrics."""

    student_place: Place
    teacher_place: Place
    recipe: Distillation
    output: Path
    data: Data
    store: Store
    accelerator: Accelerator
    ranks: Ranks
    tracked: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return product_dtype(self.recipe.compute, self.accelerator.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of matrix products in that dtype."""
        # recomputed activations must come from the same operations, and the second time torch's attention is there
        return products(self.accelerator.device, self.dtype, attention=not self.recipe.checkpointing)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainContext(DistillationJob):
    """A job with everything its training reads and changes.

    `teacher`: the model to measure the distance to on the held-out sequences, a `HeldOutTeacher` if it is gone;
    `source`: of its predictions; `quantization`: the cost of quantizing it, if the recipe does so.
    """

    student: Student
    teacher: PreTrainedModel
    source: TeacherSource
    metrics: Metrics
    quantization: dict[str, float] | None = None

    def dense_teacher(self) -> PreTrainedModel:
        """Return the teacher with its weights, loaded again if it is gone."""
        if not isinstance(self.teacher, HeldOutTeacher):
            return self.teacher
        model = load_model(self.teacher_place, str(self.accelerator.device), self.dtype, numbers=True)
        return model.requires_grad_(False)

    @property
    def reading_teacher(self) -> PreTrainedModel:
        """The model that reads what the student reads; without one, `teacher`."""
        return self.source.model if isinstance(self.source, OnlineTeacher) else self.teacher

    @property
    def steps(self) -> int:
        """The number of optimizer steps in all."""
        return self.recipe.steps or max(1, len(self.data.sequences) // self.recipe.batch)
