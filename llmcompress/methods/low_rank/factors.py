"""Low-rank methods: `svd`, `lqer` and `eora` add a term to a base, by three metrics; `low_rank` replaces the matrix.

The three take E = W - base and the truncated SVD of E S: S = I is plain SVD, a diagonal is LQER, a square root of the
input second moment is EoRA. They store Sum(base, LowRank), and replace a term that was there.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.hessian import add_damping, channel_energy, second_moment
from llmcompress.methods.solvers.low_rank import LowRankConfig, compensate, factors, leading_directions
from llmcompress.weight.nodes import Dense, Weight


class SVD(LowRankConfig):
    """Arguments of `svd`."""

    method: Literal["svd"] = "svd"
    damping: float = Field(0.01, gt=0, le=10, description="of no effect: no Hessian is read")
    examples = ({"rank": 1}, {"share": 0.2, "factor_bits": 16})


@method("svd", SVD)
def svd(layer: Layer, config: SVD) -> Layer:
    """Plain SVD of the error: the best low-rank term in weight space (as LoftQ's start, arXiv 2310.08659).

    Minimises |E - B A|^2 and ignores activations; the baseline of low-rank compensation. Stores Sum(base, LowRank).
    """
    return compensate(layer, config, torch.ones(layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device))


class LQER(LowRankConfig):
    """Arguments of `lqer`."""

    method: Literal["lqer"] = "lqer"
    damping: float = Field(0.01, gt=0, le=10, description="of no effect: only a diagonal is read")
    examples = ({"rank": 1}, {"share": 0.2, "factor_bits": 16})


@method("lqer", LQER, needs={"outer"})
def lqer(layer: Layer, config: LQER) -> Layer:
    """LQER (arXiv 2402.02446): SVD of the error with input channels weighted by their size.

    Minimises |(E - B A) diag(s)|^2 with s the root mean square of each input channel, which is optimal for uncorrelated
    channels (QERA, arXiv 2410.06040); the paper takes the mean |x|. Stores Sum(base, LowRank).
    """
    return compensate(layer, config, channel_energy(layer.inputs))


class EoRA(LowRankConfig):
    """Arguments of `eora`."""

    method: Literal["eora"] = "eora"
    examples = ({"rank": 1}, {"share": 0.2, "factor_bits": 16}, {"rank": 1, "factor_bits": 4})


@method("eora", EoRA, needs={"outer"})
def eora(layer: Layer, config: EoRA) -> Layer:
    """EoRA (arXiv 2410.21271), which is QERA-exact (arXiv 2410.06040): the best low-rank term in output space.

    Minimises tr((E - B A) H (E - B A)^T), the error on the layer's outputs, with H the input second moment: SVD in its
    eigenspace. Stores Sum(base, LowRank). Differs from the official code: no inverse of H is taken, and H is a plain
    mean over tokens, not an exponential window over samples.
    """
    return compensate(layer, config, add_damping(second_moment(layer.inputs), config.damping))


class Factors(LowRankConfig):
    """Arguments of `low_rank`. `share` is that of the dense matrix."""

    method: Literal["low_rank"] = "low_rank"
    examples = ({"rank": 1}, {"share": 0.4}, {"rank": 1, "factor_bits": 4})
    factor_bits: Literal[4, 8, 16] = Field(16, description="16 keeps bfloat16")

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        _check_first(approx)
        return self.term_sketch(approx)


@method("low_rank", Factors, needs={"outer"})
def low_rank(layer: Layer, config: Factors) -> Layer:
    """Two factors instead of the matrix: truncated SVD in output space (as SVD-LLM, arXiv 2403.07378).

    Minimises tr((W - B A) H (W - B A)^T), the error on the layer's outputs, with H the input second moment. Stores
    LowRank alone, where `eora` adds one to a base; made for experts of a mixture that are rarely used. Differs from the
    paper: the factors come from the left singular vectors in the metric, so no Cholesky factor is inverted.
    """
    _check_first(layer.approx)
    metric = add_damping(second_moment(layer.inputs), config.damping)
    target = layer.weight.double()
    directions = leading_directions(target, metric, config.rank_for(layer.approx))
    return replace(layer, approx=factors(target, directions, metric, config.factor_bits))


def _check_first(approx: Weight) -> None:
    """Raise RecipeError for a matrix that earlier steps have stored in a form of their own."""
    if not isinstance(approx, Dense):
        raise RecipeError("two factors stand for the whole matrix, so nothing but a rotation comes before; drop one")
