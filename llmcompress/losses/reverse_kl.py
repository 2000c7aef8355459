"""Reverse KL (arXiv 2306.08543): KL(student || teacher), the mean over what the student would say.

Punishes what the teacher finds unlikely, and lets a student that cannot follow everywhere drop some of it. The paper
takes it over texts that the student writes; here the texts are given.
"""

from typing import Literal

from llmcompress.losses.divergence import TemperedConfig, kl, log_probabilities, over_tokens
from llmcompress.losses.loss import LossState, Predictions, SumAndCount, loss


class ReverseKL(TemperedConfig):
    """Arguments of `reverse_kl`."""

    loss: Literal["reverse_kl"] = "reverse_kl"
    examples = ({}, {"temperature": 0.5})
    merges = True


@loss("reverse_kl", ReverseKL)
def reverse_kl(predictions: Predictions, config: ReverseKL, state: LossState | None) -> SumAndCount:
    """T^2 sum q (log q - log p) in nats."""
    log_q, log_p = log_probabilities(predictions, config.temperature)
    return over_tokens(config.temperature**2 * kl(log_q, log_p))
