"""Wanda (arXiv 2306.11695): prune by |w| times the norm of its input channel, row by row.

Exactly minimises the output error for uncorrelated inputs when weights are only dropped, not updated. Stores
Where(keep, Dense, Zero). Every row keeps the same number of weights.
"""

from typing import Literal

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.hessian import channel_energy
from llmcompress.methods.solvers.sparsity import PruneConfig, keep_largest_of_rows, prune, prune_sketch
from llmcompress.weight.nodes import Weight


class Wanda(PruneConfig):
    """Arguments of `wanda`."""

    method: Literal["wanda"] = "wanda"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"})

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return True

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return prune_sketch(approx, self, lambda out, width: [width] * out)


@method("wanda", Wanda, needs={"outer"})
def wanda(layer: Layer, config: Wanda) -> Layer:
    """Keeps the largest |w_ij| * |x_j| of each row or n:m group."""
    target = base_target(layer)
    norms = channel_energy(layer.inputs).sqrt().float()
    keep = keep_largest_of_rows(target.abs() * norms, config)
    return with_base(layer, prune(target, keep, config))
