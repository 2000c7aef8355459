"""Expected calibration error: how far a model's confidence is from how often it is right (arXiv 1706.04599).

Confidence is the probability of the likeliest next token. Predictions are sorted into 15 bins of equal width by it; in
each, confidence and share of hits differ by some amount, and the error is the mean of these amounts over all tokens.
Zero is a model of which 70 % come true where it says 70 %. Compression that leaves perplexity alone can still move it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 15


def reliability(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Sort predictions into bins -> float64 [3, BINS]: tokens, hits among them, and the sum of their confidence.

    `log_probabilities`: float32 [positions, vocabulary]; `targets`: the next tokens, int64 [positions].
    """
    largest, likeliest = log_probabilities.max(-1)
    confidence = largest.double().exp().clamp(max=1)
    rows = torch.stack((torch.ones_like(confidence), (likeliest == targets).double(), confidence))
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # with its upper end, as in the paper
    return rows.new_zeros(3, BINS).index_add_(1, bins, rows)


def calibration_error(bins: Sequence[Tensor]) -> float:
    """Return the error of predictions that were sorted piece by piece, between 0 and 1; of one token or more."""
    tokens, hits, confidence = torch.stack([each.cpu() for each in bins]).sum(0)
    return float((hits - confidence).abs().sum() / tokens.sum())
