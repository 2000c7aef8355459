"""Adaptive target enhancement (OFA-KD, arXiv 2310.19444): the teacher's prediction, with more on the true next token.

-sum ((p + e)^gamma - e) log q, e being 1 at the true token. gamma 1 is the teacher's cross-entropy; above 1 the true
token gains, every other loses, and the target's mass is not 1. Only for text that can be trusted. The paper's exits in
the middle of the student are `exits` of a recipe, for any loss on predictions.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from llmcompress.losses.divergence import log_probabilities, over_tokens
from llmcompress.losses.loss import LossConfig, LossState, Predictions, SumAndCount, loss


class OFA(LossConfig):
    """Arguments of `ofa`."""

    loss: Literal["ofa"] = "ofa"
    gamma: float = Field(1.5, ge=1, le=4, description="1 leaves the teacher's prediction as it is")
    examples = ({}, {"gamma": 1.0})

    @property
    def reads_truth(self) -> bool:
        """See `LossConfig.reads_truth`."""
        return True


@loss("ofa", OFA)
def ofa(predictions: Predictions, config: OFA, state: LossState | None) -> SumAndCount:
    """In nats. The gradient is mass q - target, mass being the sum of the target."""
    log_q, log_p = log_probabilities(predictions)
    return over_tokens(-(enhance_truth(log_p.exp(), predictions.targets, config.gamma) * log_q).sum(-1))


def enhance_truth(probabilities: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """(p + e)^gamma - e of p [tokens, vocabulary] and the true tokens [tokens]."""
    true = targets[:, None]
    p_true = probabilities.gather(-1, true)
    return (probabilities**gamma).scatter(-1, true, (1 + p_true) ** gamma - 1)
