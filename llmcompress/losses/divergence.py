"""Divergences between two distributions over the vocabulary, from log-probabilities.

Everything is float32, or float64 for float64 logits: in bfloat16 a divergence has an error floor near 0.01.

A class that either model rules out, by a logit of FLOOR or below, is left out for both: it gets no probability, no loss
and no gradient, and the rest is normalised without it. Heads padded to a round size have such classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.losses.loss import LossConfig, Predictions, Reads, SumAndCount

# Takes the place of -inf: its exponential is 0 just the same, but the difference of two of it is 0 and 0 times it is 0,
# where -inf would make NaN. float32 has room to add a few of it.
FLOOR = -1e30


class TemperedConfig(LossConfig):
    """A loss between distributions softened by a temperature T, times T^2, so that gradients keep their size."""

    temperature: float = Field(1.0, ge=0.01, le=100, description="both models' logits are divided by it")
    merges: ClassVar[bool] = False  # True if merging classes leaves it a divergence between the models, a lower bound

    def reads(self) -> Reads:
        """See `LossConfig.reads`. With a temperature other than 1, merged classes do not suffice."""
        return "merged" if self.merges and self.temperature == 1 else "whole"


def wide(values: Tensor) -> Tensor:
    """Values in the precision of the losses: float32, or float64 if they are float64 already."""
    return values if values.dtype == torch.float64 else values.float()


def shared_logits(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits [tokens, vocabulary], FLOOR where either rules a class out."""
    student, teacher = wide(predictions.student), wide(predictions.teacher.detach())
    if _all_possible(predictions.student) and _all_possible(predictions.teacher):
        return student, teacher  # as nearly always, in two passes instead of five
    excluded = (student <= FLOOR) | (teacher <= FLOOR)
    return student.masked_fill(excluded, FLOOR), teacher.masked_fill(excluded, FLOOR)


def _all_possible(logits: Tensor) -> bool:
    return not logits.numel() or bool(logits.detach().amin() > FLOOR)


def softened_logits(predictions: Predictions, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`shared_logits` divided by the temperature."""
    student, teacher = shared_logits(predictions)
    if temperature != 1:  # a pass over the logits less
        student, teacher = student / temperature, teacher / temperature
    return student, teacher


def log_probabilities(predictions: Predictions, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log q of the student and log p of the teacher, [tokens, vocabulary]."""
    student, teacher = softened_logits(predictions, temperature)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) in nats, [tokens, classes] -> [tokens]. Masses need not be 1: it is sum a (log a - log b)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def entropy(log_a: Tensor) -> Tensor:
    """The entropy in nats, [tokens, classes] -> [tokens]."""
    return -(log_a.exp() * log_a).sum(-1)


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), with 0 < share < 1."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def over_tokens(each: Tensor) -> SumAndCount:
    """The sum of a loss [tokens], and the number of tokens."""
    return each.sum(), each.new_tensor(len(each))
