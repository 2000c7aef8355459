"""Pruning by relevance: the weights through which least of the predictions flows (after LRP, arXiv 1912.08881).

The relevance of a weight for a token is w_ij x_j g_i, with the input x and the loss's gradient g by the output. Over a
row's inputs it sums to the relevance of that output, so none is lost between layers. A weight is judged by the root
mean square of it over tokens, with the means of x_j^2 and g_i^2 taken apart. These are the moments of the inputs, and
the rows' importance that `token_weights: {by: gradient, rows: true}` measures. Without it all rows count alike.

Stores Where(keep, Dense, Zero). Rows compete with each other, unlike in `wanda`.
"""

from typing import Literal

from torch import Tensor

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.hessian import channel_energy
from llmcompress.methods.solvers.sparsity import PruneConfig, keep_largest, prune


class Relevance(PruneConfig):
    """Arguments of `relevance`."""

    method: Literal["relevance"] = "relevance"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"})


@method("relevance", Relevance, needs={"outer"})
def relevance(layer: Layer, config: Relevance) -> Layer:
    """Keeps the weights with the largest relevance: of the whole layer, or of each n:m group."""
    target = base_target(layer)
    scores = relevance_of(layer, target)
    return with_base(layer, prune(target, keep_largest(scores, config), config))


def relevance_of(layer: Layer, weight: Tensor) -> Tensor:
    """Return the root mean square relevance `[out, in]` of the weights of a layer."""
    scores = weight.abs() * channel_energy(layer.inputs).sqrt().float()
    return scores if layer.rows is None else scores * layer.rows.sqrt().to(scores)[:, None]
