"""Text to choose by and to judge on, and the damage that a changed block does to its outputs on the latter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.calibration.blocks import BlockForward, RowBatch
from llmcompress.data.calibration import context_length
from llmcompress.errors import RecipeError
from llmcompress.models.dense.model import DenseModel
from llmcompress.recipe.calibration import Calibration

LENGTH = 512  # of a sequence


def judged_calibration(source: DenseModel, text: str, samples: int, one_in: int) -> Calibration:
    """Return what is read to choose by, one in so many samples of it held out to judge on.

    Raises RecipeError for too few samples.
    """
    if samples < 2:
        raise RecipeError(f"{samples} samples of text leave none to judge on; ask for at least 2")
    length = min(LENGTH, context_length(source.config) or LENGTH)
    return Calibration(dataset=text, samples=samples, length=length, held_out=max(1, samples // one_in))


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
