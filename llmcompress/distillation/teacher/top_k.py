"""The k likeliest classes of a prediction, and one more that stands for all others: the tail.

Together they are a distribution over k + 1 symbols. A divergence between two models on these symbols is a lower bound
of the divergence on all classes (merging classes never moves distributions apart). It is 0 for a student that agrees on
the k classes and on the mass of the tail. With the k classes alone, renormalised, a student would learn that all other
classes are impossible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.losses.divergence import FLOOR, wide
from llmcompress.losses.loss import Predictions, Reads


@dataclass(frozen=True, eq=False)
class Likeliest:
    """The kept predictions of a teacher (a `TeacherLogits`), a row for each token. Probabilities are natural
    logarithms."""

    ids: Tensor  # int64 [tokens, k], the likeliest first
    log_p: Tensor  # [tokens, k]
    log_tail: Tensor  # [tokens], of the mass of all other classes; -inf where there is none
    classes: int

    @staticmethod
    def of(logits: Tensor, k: int) -> Likeliest:
        """Take the likeliest of whole predictions, [tokens, vocabulary]; all classes if there are fewer than k."""
        log_p = wide(logits).log_softmax(-1)
        top, ids = log_p.topk(min(k, log_p.shape[-1]))
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        return Likeliest(ids, top, tail, log_p.shape[-1])

    def __len__(self) -> int:
        return len(self.ids)

    def vocabulary(self) -> int:
        """See `TeacherLogits.vocabulary`."""
        return self.classes

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `TeacherLogits.beside`: predictions of k + 1 symbols, and the student alone for losses without a teacher.

        The student's tail is its mass on the classes outside the teacher's k. It comes from logits, not from a
        difference to 1, which would lose all digits of a small tail.
        """
        ids, logits = self.ids[rows], wide(student)
        inside = logits.gather(-1, ids)
        outside = logits.scatter(-1, ids, FLOOR).logsumexp(-1, keepdim=True)
        known = torch.cat((self.log_p[rows], self.log_tail[rows, None]), -1)
        none = torch.full_like(targets, -1)  # which symbol the true class is part of: no loss on symbols asks
        return {
            "merged": Predictions(torch.cat((inside, outside), -1), known, none),
            "nothing": Predictions(student, student.detach(), targets),
        }
