"""Two factors instead of the matrix: truncated SVD in output space (as SVD-LLM, arXiv 2403.07378).

Minimises tr((W - B A) H (W - B A)^T), the error on the layer's outputs, with H the input second moment. Stores LowRank
alone, where `eora` adds one to a base; made for experts of a mixture that are rarely used. Differs from the paper: the
factors come from the left singular vectors in the metric, so no Cholesky factor is inverted.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.hessian import add_damping, second_moment
from llmcompress.methods.solvers.low_rank import LowRankConfig, factors, leading_directions
from llmcompress.weight.nodes import Dense, Weight


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
    """Replaces the matrix by two factors."""
    _check_first(layer.approx)
    metric = add_damping(second_moment(layer.inputs), config.damping)
    target = layer.weight.double()
    directions = leading_directions(target, metric, config.rank_for(layer.approx))
    return replace(layer, approx=factors(target, directions, metric, config.factor_bits))


def _check_first(approx: Weight) -> None:
    """Raise RecipeError for a matrix that earlier steps have stored in a form of their own."""
    if not isinstance(approx, Dense):
        raise RecipeError("two factors stand for the whole matrix, so nothing but a rotation comes before; drop one")
