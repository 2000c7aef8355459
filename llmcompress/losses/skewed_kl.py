"""Skewed KL (DistiLLM, arXiv 2402.03898): one model against a mixture that holds a share alpha of itself.

Forward: KL(p || alpha p + (1 - alpha) q). Reverse: KL(q || alpha q + (1 - alpha) p). At most -log alpha, so no single
token can take over the gradient; alpha 0 is plain KL.
"""

from typing import Literal

from pydantic import Field

from llmcompress.losses.divergence import TemperedConfig, kl, log_probabilities, mixture, over_tokens
from llmcompress.losses.loss import LossState, Predictions, SumAndCount, loss


class SkewedKL(TemperedConfig):
    """Arguments of `skewed_kl`."""

    loss: Literal["skewed_kl"] = "skewed_kl"
    direction: Literal["forward", "reverse"] = Field("forward", description="the first model: teacher, or student")
    alpha: float = Field(0.1, ge=0, lt=1, description="share of the first model in the mixture")
    examples = ({}, {"direction": "reverse"}, {"alpha": 0.0}, {"alpha": 0.7, "temperature": 2.0})
    merges = True


@loss("skewed_kl", SkewedKL)
def skewed_kl(predictions: Predictions, config: SkewedKL, state: LossState | None) -> SumAndCount:
    """T^2 KL(first || alpha first + (1 - alpha) second) in nats; first is the teacher in the forward direction."""
    log_q, log_p = log_probabilities(predictions, config.temperature)
    first, second = (log_p, log_q) if config.direction == "forward" else (log_q, log_p)
    mixed = mixture(first, second, config.alpha) if config.alpha else second
    return over_tokens(config.temperature**2 * kl(first, mixed))
