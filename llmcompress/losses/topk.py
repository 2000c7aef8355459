"""Top-k KL, this project's own: an exact split of forward KL by the teacher's k likeliest classes, each part weighted.

With K these classes, and P and Q the mass of the two models on them, the chain rule of the KL divergence gives
KL(p || q) = KL((P, 1 - P) || (Q, 1 - Q)) + P KL(p|K || q|K) + (1 - P) KL(p|rest || q|rest).
Each part has a weight; all 1 gives forward KL. It goes back to decoupled distillation (arXiv 2203.08679), which splits
off one class, and to its top-k successors (arXiv 2508.04539, 2602.20816). That the split is exact is ours.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, stack

from llmcompress.losses.divergence import FLOOR, TemperedConfig, kl, log_probabilities, over_tokens
from llmcompress.losses.loss import LossState, Predictions, SumAndCount, loss


class TopK(TemperedConfig):
    """Arguments of `topk`."""

    loss: Literal["topk"] = "topk"
    k: int = Field(10, ge=1, description="number of the teacher's likeliest classes; all of them if there are fewer")
    mass: float = Field(1.0, ge=0, description="weight of the mass on them against the rest")
    top: float = Field(2.0, ge=0, description="weight of the differences among them")
    rest: float = Field(1.0, ge=0, description="weight of the differences among the others")
    examples = ({}, {"k": 1}, {"k": 3, "rest": 0.0, "temperature": 2.0}, {"k": 10**6})


@loss("topk", TopK)
def topk(predictions: Predictions, config: TopK, state: LossState | None) -> SumAndCount:
    """T^2 times the weighted parts, in nats."""
    log_q, log_p = log_probabilities(predictions, config.temperature)
    top_p, index = log_p.topk(min(config.k, log_p.shape[-1]))
    top_q = log_q.gather(-1, index)
    rest_p, rest_q = log_p.scatter(-1, index, FLOOR), log_q.scatter(-1, index, FLOOR)
    mass_p = stack((top_p.logsumexp(-1), rest_p.logsumexp(-1)), -1)  # [tokens, 2]
    mass_q = stack((top_q.logsumexp(-1), rest_q.logsumexp(-1)), -1)
    shift = mass_p - mass_q
    top, rest = _inside(top_p, top_q, shift[:, :1]), _inside(rest_p, rest_q, shift[:, 1:])
    each = config.mass * kl(mass_p, mass_q) + config.top * top + config.rest * rest
    return over_tokens(config.temperature**2 * each)


def _inside(log_p: Tensor, log_q: Tensor, shift: Tensor) -> Tensor:
    """P KL(p|K || q|K) from the unnormalised parts [tokens, classes] and log P - log Q [tokens, 1]; -> [tokens]."""
    return (log_p.exp() * (log_p - log_q - shift)).sum(-1)
