"""Magnitude pruning: the smallest weights of the layer become zero.

Minimises |W - W_approx|^2; needs no data. Stores Where(keep, Dense, Zero). The baseline of every pruning method.
"""

from typing import Literal

from llmcompress.methods.engines.projection import largest
from llmcompress.methods.engines.sparsity import PruneConfig, keep_largest_of_rows, kept_of, prune_sketch, pruned
from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.weight.nodes import Weight


class Magnitude(PruneConfig):
    """Arguments of `magnitude`."""

    method: Literal["magnitude"] = "magnitude"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return prune_sketch(approx, self, lambda out, width: [out * width])


@method("magnitude", Magnitude)
def magnitude(layer: Layer, config: Magnitude) -> Layer:
    """Keeps the largest |w|: of the whole layer, or of each n:m group."""
    target = base_target(layer)
    if config.sparsity is None:
        keep = keep_largest_of_rows(target.abs(), config)
    else:
        keep = largest(target.abs(), kept_of(target.numel(), config.sparsity))
    return with_base(layer, pruned(target, keep, config))
