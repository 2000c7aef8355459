"""EoRA (arXiv 2410.21271), which is QERA-exact (arXiv 2410.06040): the best low-rank term in output space.

Minimises tr((E - B A) H (E - B A)^T), the error on the layer's outputs, with H the input second moment: SVD in its
eigenspace. Stores Sum(base, LowRank). Differs from the official code: no inverse of H is taken, and H is a plain mean
over tokens, not an exponential window over samples.
"""

from typing import Literal

from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.hessian import add_damping, second_moment
from llmcompress.methods.solvers.low_rank import LowRankConfig, compensate


class EoRA(LowRankConfig):
    """Arguments of `eora`."""

    method: Literal["eora"] = "eora"
    examples = ({"rank": 1}, {"share": 0.2, "factor_bits": 16}, {"rank": 1, "factor_bits": 4})


@method("eora", EoRA, needs={"outer"})
def eora(layer: Layer, config: EoRA) -> Layer:
    """Adds the output-optimal low-rank term for what the base lost."""
    return compensate(layer, config, add_damping(second_moment(layer.inputs), config.damping))
