"""Random pruning: the control that every other choice of weights has to beat (arXiv 2202.02643).

Needs no data, and the same seed gives the same weights. Stores Where(keep, Dense, Zero). Random masks with sensible
shares for the layers come near to chosen ones in large networks that are trained afterwards.
"""

from typing import Literal

import torch

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.sparsity import PruneConfig, keep_largest, prune
from llmcompress.runtime.seeding import generator


class RandomMask(PruneConfig):
    """Arguments of `random_mask`."""

    method: Literal["random_mask"] = "random_mask"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"})


@method("random_mask", RandomMask)
def random_mask(layer: Layer, config: RandomMask) -> Layer:
    """Keeps weights by chance: of the whole layer, or of each n:m group."""
    target = base_target(layer)
    scores = torch.rand(target.shape, generator=generator(layer.seed, layer.name, "mask")).to(target.device)
    return with_base(layer, prune(target, keep_largest(scores, config), config))
