"""The sources of the teacher's predictions of a step: the teacher itself, reading along, or a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from llmcompress.data.batch import Batch
from llmcompress.distill.objective.chunked_loss import Online, TeacherLogits
from llmcompress.distill.objective.heads import head_of, hidden_states
from llmcompress.distill.teacher.cache import Cache
from llmcompress.distill.teacher.top_k import Likeliest

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
