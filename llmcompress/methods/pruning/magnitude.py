"""Magnitude pruning: the smallest weights of the layer become zero.

Minimises |W - W_approx|^2; needs no data. Stores Where(keep, Dense, Zero). The baseline of every pruning method.
"""

from typing import Literal

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.sparsity import PruneConfig, keep_largest, prune


class Magnitude(PruneConfig):
    """Arguments of `magnitude`."""

    method: Literal["magnitude"] = "magnitude"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"})


@method("magnitude", Magnitude)
def magnitude(layer: Layer, config: Magnitude) -> Layer:
    """Keeps the largest |w|: of the whole layer, or of each n:m group."""
    target = base_target(layer)
    return with_base(layer, prune(target, keep_largest(target.abs(), config), config))
