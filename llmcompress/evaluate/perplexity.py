"""Perplexity: the exponential of the mean negative log-probability of the next token.

The text is tokenized once, without special tokens, and cut into non-overlapping windows. Every window is read on its
own, so its first token is predicted by nothing and does not count: `windows * (length - 1)` tokens do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.errors import InputError, NumericsError, RecipeError
from llmcompress.tokens import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = 256  # positions whose log-probabilities are in memory at once: 256 * 49152 * 4 bytes = 50 MB


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll); nll in nats per token, the mean over `tokens` predicted tokens."""

    value: float
    tokens: int
    nll: float

    @staticmethod
    def of(total: float, tokens: int) -> Perplexity:
        """From the sum of the negative log-probabilities. Raises NumericsError when it is NaN or infinite."""
        if not math.isfinite(total):
            raise NumericsError("the model's log-probabilities on the evaluation text are NaN or infinite")
        nll = total / tokens
        return Perplexity(math.exp(nll) if nll < 700 else math.inf, tokens, nll)


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    windows: int = 32,
    length: int = 1024,
    model_config: PreTrainedConfig | None = None,
) -> Tensor:
    """The first `windows` windows of `text` -> int64 [at most windows, length].

    Raises InputError when the text is too short for one window, RecipeError for a length the model cannot read.
    """
    if windows < 1 or length < 2:
        raise RecipeError(f"perplexity needs at least one window of two tokens, not windows {windows}, length {length}")
    context = context_length(model_config)
    if context is not None and length > context:
        raise RecipeError(f"evaluation length {length} is more than the model's context of {context}; use at most that")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    count = min(windows, len(ids) // length)
    if count == 0:
        raise InputError(
            f"the evaluation text has {len(ids)} tokens, less than one window of {length}; "
            "give more text or a lower length"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def perplexity(model: PreTrainedModel, ids: Tensor, batch_size: int = 1) -> Perplexity:
    """Of `model`, in the dtype it has, on windows `ids` [n, length]. Holds logits of `batch_size` windows."""
    total = 0.0
    for batch, logits in window_logits(model, ids, batch_size):
        for predicted, targets in position_chunks(logits, batch):
            total += negative_log_likelihood(predicted.float().log_softmax(-1), targets)
    return Perplexity.of(total, predicted_tokens(ids))


def predicted_tokens(ids: Tensor) -> int:
    """How many tokens of windows [n, length] are predicted."""
    return ids.shape[0] * (ids.shape[1] - 1)


@torch.no_grad()
def window_logits(model: PreTrainedModel, ids: Tensor, batch_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(windows [batch, length], logits [batch, length, vocabulary]), on the device of the model."""
    for batch in ids.split(batch_size):
        here = batch.to(model.device)
        yield here, model(input_ids=here, use_cache=False).logits


def position_chunks(logits: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [positions, vocabulary], next tokens [positions]) of all that is predicted, a few positions at a time."""
    for row, window in zip(logits[:, :-1], ids[:, 1:]):
        yield from zip(row.split(POSITIONS), window.split(POSITIONS))


def negative_log_likelihood(log_probabilities: Tensor, targets: Tensor) -> float:
    """Sum over positions: [positions, vocabulary] float32, [positions] -> nats, added up in float64."""
    return -float(log_probabilities.gather(-1, targets[:, None]).double().sum())
