"""LQER (arXiv 2402.02446): SVD of the error with input channels weighted by their size.

Minimises |(E - B A) diag(s)|^2 with s the root mean square of each input channel, which is optimal for uncorrelated
channels (QERA, arXiv 2410.06040); the paper takes the mean |x|. Stores Sum(base, LowRank).
"""

from typing import Literal

import torch

from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.hessian import channel_energy
from llmcompress.methods.solvers.low_rank import LowRankConfig, compensate


class LQER(LowRankConfig):
    """Arguments of `lqer`."""

    method: Literal["lqer"] = "lqer"
    examples = ({"rank": 1}, {"share": 0.2, "factor_bits": 16})


@method("lqer", LQER, needs={"outer"})
def lqer(layer: Layer, config: LQER) -> Layer:
    """Adds the channel-weighted SVD of what the base lost."""
    return compensate(layer, config, torch.diag(channel_energy(layer.inputs)))
