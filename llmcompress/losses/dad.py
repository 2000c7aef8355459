"""Deviation-aware distillation (DB-LLM, arXiv 2402.11960) of forward KL, where the paper weighs the cross-entropy.

Tokens on which the teacher hesitates weigh more: forward KL is multiplied by H(p)^gamma, with the teacher's entropy H
in nats. The count is the sum of the weights, so the mean weight of a whole batch is 1 and gamma does not change the
learning rate. The gradient is that of the paper's weighted cross-entropy, but the loss is 0 at the teacher.
"""

from typing import Literal

from pydantic import Field

from llmcompress.losses.divergence import entropy, kl, log_probabilities
from llmcompress.losses.loss import LossConfig, LossState, Predictions, SumAndCount, loss


class DAD(LossConfig):
    """Arguments of `dad`."""

    loss: Literal["dad"] = "dad"
    gamma: float = Field(0.1, ge=0, le=10, description="0 weighs all tokens the same")
    least_entropy: float = Field(1e-4, gt=0, le=1, description="nats; what is less counts as this much")
    examples = ({}, {"gamma": 0.0}, {"gamma": 2.0, "least_entropy": 0.5})

    @property
    def counts_tokens(self) -> bool:
        """False: the count is the sum of the tokens' weights."""
        return False


@loss("dad", DAD)
def dad(predictions: Predictions, config: DAD, state: LossState | None) -> SumAndCount:
    """sum over tokens of w KL(p || q), and sum of w = max(H(p), least_entropy)^gamma."""
    log_q, log_p = log_probabilities(predictions)
    weights = entropy(log_p).clamp_min(config.least_entropy) ** config.gamma
    return (weights * kl(log_p, log_q)).sum(), weights.sum()
