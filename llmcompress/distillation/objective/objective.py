"""The objective of a step: the student and its losses as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.chunked_loss import chunked_loss
from llmcompress.distillation.objective.early_exits import Exits
from llmcompress.distillation.objective.forward import head_of, hidden_states
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.teacher.predictions import TeacherSource
from llmcompress.losses.loss import LossState
from llmcompress.recipe.distillation import Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(nn.Module):
    """The student and its losses as one module, so that a wrapper of several processes sees every gradient."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSource,
        matching: StateMatching,
        terms: Sequence[tuple[Term, LossState | None]],
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher, self.matching = teacher, matching  # no modules, so that `train()` does not reach the teacher
        self.exits = Exits.of(student, [term for term, _ in terms])
        self.projections = nn.ModuleDict({**matching.projections, **self.exits.branches})
        self.terms = terms

    def forward(self, batch: Batch, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of all losses on `batch`, with gradient even if no token counts; and the sum and the
        count of each loss, `[losses, 2]`, without."""
        with self.matching.record_states() as states, self.exits.record_states() as exit_states:
            teacher = self.teacher.predictions(batch)
            hidden = hidden_states(self.student, batch)
        rows, targets = batch.predicting, batch.ids[batch.counted]
        inner = {number: self.matching.measure(number, states, rows) for number in self.matching.pairs}
        for number in self.exits.numbers:
            inner[number] = self.exits.measure(number, self.terms[number], exit_states, rows, teacher, targets)
        weighted = [(term.of, state, weight) for (term, state), weight in zip(self.terms, weights, strict=True)]
        final = chunked_loss(
            hidden[rows],
            head_of(self.student),
            teacher,
            targets,
            [term for number, term in enumerate(weighted) if number not in inner],
        )
        total, report, others = final.total, [], iter(final.terms)
        for number, weight in enumerate(weights):
            value, count = inner[number] if number in inner else next(others)
            if number in inner:
                total = total + weight * value
            report.append(torch.stack([value.detach(), count]))
        return total, torch.stack(report)
