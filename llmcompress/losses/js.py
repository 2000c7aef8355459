"""Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649): both models against their mixture.

With m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m), at most log 2. It vanishes like beta towards 0
(times forward KL) and like 1 - beta towards 1 (times reverse KL); at these two ends it is those divergences themselves.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from llmcompress.losses.divergence import TemperedConfig, kl, log_probabilities, mixture, over_tokens
from llmcompress.losses.loss import LossState, Predictions, SumAndCount, loss


class JS(TemperedConfig):
    """Arguments of `js`."""

    loss: Literal["js"] = "js"
    beta: float = Field(0.5, ge=0, le=1, description="the teacher's share; 0 is forward KL, 1 is reverse KL")
    examples = ({}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1, "temperature": 2.0})
    merges = True


@loss("js", JS)
def js(predictions: Predictions, config: JS, state: LossState | None) -> SumAndCount:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) in nats."""
    log_q, log_p = log_probabilities(predictions, config.temperature)
    return over_tokens(config.temperature**2 * _divergence(log_p, log_q, config.beta))


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    mixed = mixture(log_p, log_q, beta)
    return beta * kl(log_p, mixed) + (1 - beta) * kl(log_q, mixed)
