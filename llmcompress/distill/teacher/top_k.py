"""The k likeliest classes of a prediction, and one more that stands for all others: the tail.

A distribution over k + 1 symbols. A divergence between two models on these symbols is a lower bound of theirs on all
classes (merging classes never moves distributions apart), and is 0 for a student that agrees on the k classes and on
how much is left. With k classes alone, renormalised, a student would learn that nothing else ever comes.
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
    """All that is left of a teacher (a `head.Teacher`), a row for each token. Probabilities are natural logarithms."""

    ids: Tensor  # int64 [tokens, k], the likeliest first
    log_p: Tensor  # [tokens, k]
    log_tail: Tensor  # [tokens], of the mass of all other classes; -inf where there is none
    classes: int

    @staticmethod
    def of(logits: Tensor, k: int) -> Likeliest:
        """From whole predictions, [tokens, vocabulary]; all classes where there are fewer than k."""
        log_p = wide(logits).log_softmax(-1)
        top, ids = log_p.topk(min(k, log_p.shape[-1]))
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        return Likeliest(ids, top, tail, log_p.shape[-1])

    def __len__(self) -> int:
        return len(self.ids)

    def vocabulary(self) -> int:
        """See `head.Teacher.vocabulary`."""
        return self.classes

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `head.Teacher.beside`: predictions of k + 1 symbols, and the student alone for what needs no teacher.

        The student's tail is what it gives to the classes outside the teacher's k, from its logits and not from a
        difference to 1, which would lose all digits of a small one.
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
