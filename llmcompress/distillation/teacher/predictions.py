"""The sources of the teacher's predictions of a step: the teacher itself, reading along as far as losses compare
anything, a cache, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.chunked_loss import Online, TeacherLogits
from llmcompress.distillation.objective.heads import head_of, hidden_states
from llmcompress.distillation.teacher.cache import Cache
from llmcompress.distillation.teacher.top_k import Likeliest
from llmcompress.losses.loss import Predictions, Reads
from llmcompress.models.dense.blocks import run_until

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teaching(Protocol):
    """Gives the teacher's predictions of sequences."""

    def predictions(self, batch: Batch) -> TeacherLogits:
        """Return the predictions of all tokens of `batch` that count, sequence after sequence."""


@dataclass(frozen=True, eq=False)
class ReadsAlong:
    """The teacher reads what the student reads."""

    model: PreTrainedModel

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Online:
        """See `Teaching.predictions`."""
        return Online(hidden_states(self.model, batch)[batch.predicting], head_of(self.model))


@dataclass(frozen=True, eq=False)
class ReadBack:
    """The teacher has read everything before."""

    cache: Cache

    def predictions(self, batch: Batch) -> Likeliest:
        """See `Teaching.predictions`. Raises ValueError for sequences without their numbers."""
        if batch.numbers is None:
            raise ValueError("predictions are kept by the numbers of sequences, and these have none")
        return self.cache.of(batch.numbers.tolist(), batch.ids.device)


@dataclass(frozen=True, eq=False)
class ReadsBeginning:
    """The teacher reads along up to the input of `block`, behind which no loss compares anything, and predicts none of
    `classes` tokens (DMAE, arXiv 2208.12256: early features for a part of the teacher's time)."""

    model: PreTrainedModel
    block: int
    classes: int

    @torch.no_grad()
    def predictions(self, batch: Batch) -> NoLogits:
        """See `Teaching.predictions`."""
        run_until(self.model, self.block, lambda: hidden_states(self.model, batch))
        return NoLogits(batch.targets, self.classes)


@dataclass(frozen=True, eq=False)
class Unheard:
    """A teacher of `classes` tokens that no loss reads: it does not run."""

    classes: int

    def predictions(self, batch: Batch) -> NoLogits:
        """See `Teaching.predictions`."""
        return NoLogits(batch.targets, self.classes)


@dataclass(frozen=True)
class NoLogits:
    """The predictions of `tokens` tokens that nobody has made; see `TeacherLogits`."""

    tokens: int
    classes: int

    def __len__(self) -> int:
        return self.tokens

    def vocabulary(self) -> int:
        """See `TeacherLogits.vocabulary`."""
        return self.classes

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `TeacherLogits.beside`: for losses that read nothing alone, which leave what stands for it."""
        return {"nothing": Predictions(student, student.detach(), targets)}
