"""The importance of a job's tokens and rows, from one backward pass, where its recipe weighs tokens by gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.calibration.gradients import Importance, importance
from llmcompress.compression.job import Job
from llmcompress.runtime.precision import product_dtype
from llmcompress.runtime.ranks import ALONE, Ranks

Kept = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]  # see `Journal.kept`


def importance_of(
    job: Job, sequences: Tensor, device: torch.device, ranks: Ranks = ALONE, kept: Kept | None = None
) -> Importance | None:
    """Return what tokens of `sequences [sequences, length]` and rows count; None where the recipe does not ask for it.

    `kept`: keeps it for a run that resumes; of several processes, each has its own tokens and finds it again. Raises
    what `gradients.importance` raises.
    """
    recipe = job.recipe
    if recipe.token_weights is None or recipe.token_weights.by != "gradient":
        return None

    def found() -> Importance:
        dtype = product_dtype(recipe.compute, device)
        return importance(job.source, job.arch, sequences, seed=recipe.seed, device=device, dtype=dtype, ranks=ranks)

    if kept is None or ranks.count > 1:
        return found()
    return Importance.from_tensors(kept("importance", lambda: found().tensors()))
