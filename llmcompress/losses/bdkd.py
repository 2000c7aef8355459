"""Balanced divergences after BD-KD (arXiv 2212.12965); the weights are our reading, not checked against its code.

Forward and reverse KL are added, and one of them is raised at every token. Where the student is less certain than its
teacher (by entropy), reverse KL is raised, which sharpens it; elsewhere forward KL is raised, which spreads it. The
weights are constants of the gradient.
"""

from typing import Literal

from pydantic import Field

from llmcompress.losses.divergence import TemperedConfig, entropy, kl, log_probabilities, over_tokens
from llmcompress.losses.loss import LossState, Predictions, SumAndCount, loss


class BDKD(TemperedConfig):
    """Arguments of `bdkd`."""

    loss: Literal["bdkd"] = "bdkd"
    raised: float = Field(2.0, ge=1, le=100, description="weight of the raised divergence; the other's is 1")
    examples = ({}, {"raised": 1.0}, {"raised": 5.0, "temperature": 2.0})


@loss("bdkd", BDKD)
def bdkd(predictions: Predictions, config: BDKD, state: LossState | None) -> SumAndCount:
    """T^2 (a KL(p || q) + b KL(q || p)) in nats; (a, b) is (1, raised) where H(q) > H(p), else (raised, 1)."""
    log_q, log_p = log_probabilities(predictions, config.temperature)
    unsure = entropy(log_q.detach()) > entropy(log_p)
    forward, reverse = kl(log_p, log_q), kl(log_q, log_p)
    extra = (config.raised - 1) * reverse.where(unsure, forward)
    return over_tokens(config.temperature**2 * (forward + reverse + extra))
