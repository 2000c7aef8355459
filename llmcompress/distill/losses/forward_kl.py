"""Forward KL (arXiv 1503.02531): KL(teacher || student), the mean over what the teacher would say.

Covers all that the teacher finds likely; its gradient T (q - p) is bounded. The default: a student that starts near
its teacher needs no other.
"""

from typing import Literal

from llmcompress.distill.losses.divergence import TemperedConfig, kl, log_probabilities, over_tokens
from llmcompress.distill.losses.loss import LossState, Predictions, SumAndCount, loss


class ForwardKL(TemperedConfig):
    """Arguments of `forward_kl`."""

    loss: Literal["forward_kl"] = "forward_kl"
    examples = ({}, {"temperature": 2.0})


@loss("forward_kl", ForwardKL)
def forward_kl(predictions: Predictions, config: ForwardKL, state: LossState | None) -> SumAndCount:
    """T^2 sum p (log p - log q) in nats."""
    log_q, log_p = log_probabilities(predictions, config.temperature)
    return over_tokens(config.temperature**2 * kl(log_p, log_q))
