"""The objective: the student and its losses as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.chunked_loss import chunked_loss
from llmcompress.distillation.objective.early_exits import Exits
from llmcompress.distillation.objective.heads import head_of, hidden_states, joined
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.teacher.predictions import Teaching
from llmcompress.losses.loss import LossState
from llmcompress.recipe.distillation import Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(nn.Module):
    """The student and its losses as one module, so that a wrapper of several processes sees every gradient."""

    def __init__(
        self,
        student: PreTrainedModel,
        teaching: Teaching,
        matching: StateMatching,
        terms: Sequence[tuple[Term, LossState | None]],
    ) -> None:
        super().__init__()
        self.student = student
        self.teaching, self.matching = teaching, matching  # no modules, so that `train()` does not reach the teacher
        self.exits = Exits.of(student, [term for term, _ in terms])
        self.projections = nn.ModuleDict({**matching.projections, **self.exits.branches})
        self.terms = terms

    def forward(self, batch: Batch, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of all losses on `batch`, with gradient, even if no token in it counts; and the sum
        and the count of each loss, `[losses, 2]`, without."""
        with self.matching.watched() as states, self.exits.watched() as passed:
            teacher = self.teaching.predictions(batch)
            given = hidden_states(self.student, batch)
        rows, targets = batch.predicting, batch.ids[batch.counted]
        elsewhere = {number: self.matching.measured(number, states, rows) for number in self.matching.pairs}
        for number in self.exits.numbers:
            elsewhere[number] = self.exits.measured(number, self.terms[number], passed, rows, teacher, targets)
        weighted = [(term.of, state, weight) for (term, state), weight in zip(self.terms, weights, strict=True)]
        found = chunked_loss(
            given[rows],
            head_of(self.student),
            teacher,
            targets,
            [term for number, term in enumerate(weighted) if number not in elsewhere],
        )
        return joined(found, elsewhere, weights)
