"""Cross-entropy with the true next token: no distillation, but the control for it, or a second term beside one."""

from typing import Literal

from torch import nn

from llmcompress.losses.divergence import over_tokens, wide
from llmcompress.losses.loss import LossConfig, LossState, Predictions, Reads, SumAndCount, loss


class CrossEntropy(LossConfig):
    """Arguments of `cross_entropy`: none."""

    loss: Literal["cross_entropy"] = "cross_entropy"

    @property
    def reads_truth(self) -> bool:
        """See `LossConfig.reads_truth`."""
        return True

    def reads(self) -> Reads:
        """See `LossConfig.reads`."""
        return "nothing"


@loss("cross_entropy", CrossEntropy)
def cross_entropy(predictions: Predictions, config: CrossEntropy, state: LossState | None) -> SumAndCount:
    """-log q(target) in nats, over the student's own classes whatever the teacher rules out."""
    return over_tokens(nn.functional.cross_entropy(wide(predictions.student), predictions.targets, reduction="none"))
