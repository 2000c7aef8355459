"""Relations between positions (MiniLMv2, arXiv 2012.15828): which earlier positions are alike, not where they lie.

States of a layer (hidden, query, key or value) are split into relation heads; R = softmax(A A^T / sqrt(width of a
head)) over the positions up to each; the loss is KL(R_teacher || R_student). Relations are [length, length] whatever
the widths, so no projection is needed. Differs from the paper by the causal mask, since these are causal models.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmcompress.errors import InputError
from llmcompress.losses.divergence import FLOOR, kl, wide
from llmcompress.losses.loss import Features, LossConfig, SumAndCount, feature_loss


class MiniLM(LossConfig):
    """Arguments of `minilm`."""

    loss: Literal["minilm"] = "minilm"
    relation_heads: int = Field(8, ge=1, description="parts that the widths of both models are split into")
    chunk: int = Field(128, ge=1, description="positions whose relations are in memory at once; changes no result")
    examples = ({"relation_heads": 1}, {"relation_heads": 2, "chunk": 3})


@feature_loss("minilm", MiniLM)
def minilm(features: Features, config: MiniLM) -> SumAndCount:
    """KL in nats over positions, the mean over relation heads, and the number of positions.

    States are [sequences, length, width]. Positions that do not count are related to none. The backward pass
    recomputes relations, a chunk at a time. Raises InputError for a width that the heads do not divide.
    """
    keep = features.keep
    if keep is None:
        keep = torch.ones(features.student.shape[:2], dtype=torch.bool, device=features.student.device)
    student, teacher = (
        _heads(wide(states), config.relation_heads).where(keep[:, None, :, None], 0)  # padding may hold NaN
        for states in (features.student, features.teacher.detach())
    )
    total = student.new_zeros(())
    for start in range(0, student.shape[-2], config.chunk):
        total = total + checkpoint(
            _divergence, student, teacher, keep, start, config.chunk, use_reentrant=False, preserve_rng_state=False
        )
    return total / config.relation_heads, keep.sum().to(total)


def _heads(states: Tensor, heads: int) -> Tensor:
    """[sequences, length, width] -> [sequences, heads, length, width of a head]."""
    if states.ndim != 3 or states.shape[-1] % heads:
        raise InputError(
            f"states {tuple(states.shape)} cannot be related by {heads} heads; they must be [sequences, length, width] "
            "and relation_heads a divisor of the width"
        )
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _divergence(student: Tensor, teacher: Tensor, keep: Tensor, start: int, chunk: int) -> Tensor:
    """The sum over the positions from `start`; states [sequences, heads, length, width of a head]."""
    stop = min(start + chunk, keep.shape[1])
    index = torch.arange(stop, device=keep.device)
    related = (index[start:, None] >= index) & keep[:, None, :stop]  # [sequences, chunk, stop], itself among them
    log_q, log_p = (_relations(states, related[:, None], start) for states in (student, teacher))
    return kl(log_p, log_q).where(keep[:, None, start:stop], 0).sum()


def _relations(states: Tensor, related: Tensor, start: int) -> Tensor:
    """log R [sequences, heads, chunk, stop] of the positions from `start` with all up to their end."""
    stop = related.shape[-1]
    alike = states[:, :, start:stop] @ states[:, :, :stop].transpose(-1, -2) / states.shape[-1] ** 0.5
    return alike.masked_fill(~related, FLOOR).log_softmax(-1)
