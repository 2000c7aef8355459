"""Forward KL (arXiv 1503.02531): KL(teacher || student), the mean over what the teacher would say.

Covers all that the teacher finds likely; its gradient T (q - p) is bounded. The default: a student that starts near
its teacher needs no other.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmcompress.losses.divergence import TemperedConfig, over_tokens, softened_logits
from llmcompress.losses.loss import LossState, Predictions, SumAndCount, loss


class ForwardKL(TemperedConfig):
    """Arguments of `forward_kl`."""

    loss: Literal["forward_kl"] = "forward_kl"
    examples = ({}, {"temperature": 2.0})
    merges = True


@loss("forward_kl", ForwardKL)
def forward_kl(predictions: Predictions, config: ForwardKL, state: LossState | None) -> SumAndCount:
    """T^2 sum p (log p - log q) in nats."""
    each: Tensor = _Divergence.apply(*softened_logits(predictions, config.temperature))
    return over_tokens(config.temperature**2 * each)


class _Divergence(torch.autograd.Function):
    """KL of logits, [tokens, vocabulary] -> [tokens]. Computes its gradient on the way, in place, which takes half the
    passes over memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        p = log_p.exp()
        each = log_p.sub_(log_q).mul_(p).sum(-1)  # as a product, autocast would round it to bfloat16
        ctx.save_for_backward(log_q.exp_().sub_(p))
        return each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        [difference] = ctx.saved_tensors
        return difference * incoming[:, None], None
