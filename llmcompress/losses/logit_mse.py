"""Squared distance of logits (arXiv 2105.08919): the student's against the teacher's, both centred over the vocabulary.

Centred, because a constant on all logits changes no prediction. It asks for likely and unlikely classes to the same
degree, where KL asks for likely ones.
"""

from typing import Literal

from llmcompress.losses.divergence import FLOOR, over_tokens, shared_logits
from llmcompress.losses.loss import LossConfig, LossState, Predictions, SumAndCount, loss


class LogitMSE(LossConfig):
    """Arguments of `logit_mse`: none."""

    loss: Literal["logit_mse"] = "logit_mse"


@loss("logit_mse", LogitMSE)
def logit_mse(predictions: Predictions, config: LogitMSE, state: LossState | None) -> SumAndCount:
    """Half the mean square over the classes that neither model rules out."""
    student, teacher = shared_logits(predictions)
    kept = teacher > FLOOR
    classes = kept.sum(-1, keepdim=True).clamp_min(1)
    difference = student - teacher  # 0 where a class is ruled out
    centred = (difference - difference.sum(-1, keepdim=True) / classes).where(kept, 0)
    return over_tokens((centred.square() / (2 * classes)).sum(-1))
