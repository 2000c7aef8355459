"""Plain SVD of the error: the best low-rank term in weight space (as LoftQ's start, arXiv 2310.08659).

Minimises |E - B A|^2 and ignores activations; the baseline of low-rank compensation. Stores Sum(base, LowRank).
"""

from typing import Literal

import torch

from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.low_rank import LowRankConfig, compensate


class SVD(LowRankConfig):
    """Arguments of `svd`."""

    method: Literal["svd"] = "svd"
    examples = ({"rank": 1}, {"share": 0.2, "factor_bits": 16})


@method("svd", SVD)
def svd(layer: Layer, config: SVD) -> Layer:
    """Adds the SVD of what the base lost."""
    return compensate(layer, config, torch.eye(layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device))
