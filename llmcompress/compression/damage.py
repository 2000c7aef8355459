"""The damage of a changed block to its outputs on held-out text, as predicted before a checkpoint is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.calibrate.blocks import BlockForward, RowBatch


@torch.no_grad()
def outputs_of(run: BlockForward, hidden: Tensor, batches: Sequence[RowBatch]) -> list[Tensor]:
    """Return a block's outputs on each batch of `hidden [sequences, length, width]`, `[sequences, length, width]`."""
    return [run(hidden[batch.rows], batch.rows) for batch in batches]


@torch.no_grad()
def relative_damage(run: BlockForward, hidden: Tensor, batches: Sequence[RowBatch], before: Sequence[Tensor]) -> float:
    """Return how far a block's outputs are from those `before`.

    That is the mean over tokens of the squared change, relative to the squared output: tokens with huge hidden states
    count like others.
    """
    total, count = 0.0, 0
    for batch, old in zip(batches, before, strict=True):
        change = run(hidden[batch.rows], batch.rows) - old
        shares = change.double().square().sum(-1) / old.double().square().sum(-1).clamp_min(1e-30)
        total, count = total + float(shares.sum()), count + shares.numel()
    return total / count
