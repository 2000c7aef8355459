"""How far a compressed model is from its teacher, token by token: KL divergence and agreement on the likeliest token.

Perplexity can stay while answers change; these two cannot (arXiv 2407.09141). Both models read the same windows, and
one pass of each also gives both perplexities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.evaluate.perplexity import (
    Perplexity,
    negative_log_likelihood,
    position_chunks,
    predicted_tokens,
    window_logits,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Comparison:
    """kl: KL(teacher || student) in nats per token. top1_agreement: share of tokens with the same likeliest token."""

    kl: float
    top1_agreement: float
    tokens: int
    teacher: Perplexity
    student: Perplexity


def compare(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor, batch_size: int = 1) -> Comparison:
    """Both models on windows `ids` [n, length], over the positions that perplexity counts.

    Log-probabilities are float32, sums float64. Raises InputError when the vocabularies differ.
    """
    divergence, same, losses = 0.0, 0, [0.0, 0.0]
    pairs = zip(window_logits(teacher, ids, batch_size), window_logits(student, ids, batch_size))
    for (batch, wanted), (_, given) in pairs:
        if wanted.shape != given.shape:
            raise InputError(
                f"the models cannot be compared: one has a vocabulary of {wanted.shape[-1]}, the other of "
                f"{given.shape[-1]} tokens; compare a model with the one it was made from"
            )
        given = given.to(wanted.device)
        chunks = zip(position_chunks(wanted, batch), position_chunks(given, batch))
        for (teacher_logits, targets), (student_logits, _) in chunks:
            p, q = teacher_logits.float().log_softmax(-1), student_logits.float().log_softmax(-1)
            divergence += float(kl_divergence(p, q).double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            losses[0] += negative_log_likelihood(p, targets)
            losses[1] += negative_log_likelihood(q, targets)
    tokens = predicted_tokens(ids)
    scores = [Perplexity.of(loss, tokens) for loss in losses]
    return Comparison(divergence / tokens, same / tokens, tokens, teacher=scores[0], student=scores[1])


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [positions, vocabulary] -> [positions], in nats."""
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
