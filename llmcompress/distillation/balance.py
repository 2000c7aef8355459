"""The part of the gradient that each loss of an objective has, and weights that make it what the recipe says.

Losses on hidden states and on predictions are of unlike sizes, which change as a student learns; with fixed weights one
of them can be all that is learned. With `balance: true` the gradient of each loss is measured alone at every look at
the held-out sequences, on the batch of the next step, and its weight scaled so that the norms are in the proportion of
the recipe's weights (after LAPTOP-Diff, arXiv 2404.11098, whose losses are divided by the size of the teacher's states,
as `hidden` is; GradNorm, arXiv 1711.02257, balances norms). The first loss keeps its own scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.data.batch import Batch
from llmcompress.distillation.metrics import term_names
from llmcompress.distillation.parallel.strategy import Engine
from llmcompress.recipe.distillation import Term

if TYPE_CHECKING:
    from llmcompress.distillation.context import TrainContext

LARGEST = 1e6  # factor, for a loss whose gradient is next to nothing


def gradient_norms(run: TrainContext, engine: Engine, parts: Sequence[Batch], weights: Sequence[float]) -> list[float]:
    """Return the norm of the gradient of each loss alone, on a batch; no gradient is left behind.

    `parts`: this process's micro-batches; `weights`: factors of the losses' sums. Every process has to call this.
    """
    norms = []
    for number, weight in enumerate(weights):
        alone = [weight if other == number else 0.0 for other in range(len(weights))]
        for done, part in enumerate(parts, start=1):
            with engine.no_sync(last=done == len(parts)):
                with run.autocast():
                    total, _ = engine.measure(part, alone)
                engine.backward(total)
        norms.append(engine.gradient_norm())
    return norms


def gradient_shares(norms: Sequence[float], weights: Sequence[float], terms: Sequence[Term]) -> dict[str, float]:
    """Return the part that each loss has of the sum of all norms, weighted, by its name."""
    sizes = [norm * weight for norm, weight in zip(norms, weights, strict=True)]
    total = math.fsum(sizes) or 1.0
    return {name: size / total for name, size in zip(term_names(terms), sizes, strict=True)}


def balanced(norms: Sequence[float]) -> list[float]:
    """Return the factor of each loss that gives its gradient the norm of the first one's; 1 for one without any."""
    return [min(norms[0] / norm, LARGEST) if norm and norms[0] else 1.0 for norm in norms]
