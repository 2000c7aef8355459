"""Scalar k-means (SqueezeLLM, arXiv 2306.07629): every weight goes to one of 2^bits points, placed where weights are.

Points minimise the squared error, weighted by the Hessian diagonal (or, in the feedback loop, by what an error costs
there), and are fitted to outputs by least squares at the end. Stores a `Codebook` of single weights.

Differs from the paper: all rows share the points, and each has a float16 scale, instead of points of its own (see
`codebooks`). Errors are weighted by layer inputs, not by gradients. There are no sparse outliers. `feedback: false` is
closer to the paper.
"""

from typing import Literal

from pydantic import Field

from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.codebooks import CodebookConfig, codebook_sketch, quantize_to_codebooks
from llmcompress.weight.nodes import Weight


class KMeans(CodebookConfig):
    """Arguments of `kmeans`."""

    method: Literal["kmeans"] = "kmeans"
    bits: int = Field(2, ge=1, le=8, description="a weight")
    feedback: bool = Field(True, description="columns make up for the errors of those before them (GPTQ)")
    examples = ({}, {"bits": 1}, {"bits": 4}, {"bits": 3, "feedback": False})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return codebook_sketch(approx, [2**self.bits], 1, 0)


@method("kmeans", KMeans, needs={"outer"}, data_free=True)
def kmeans(layer: Layer, config: KMeans) -> Layer:
    """Quantizes the base to the points of a codebook."""
    return quantize_to_codebooks(layer, config, [2**config.bits], 1, 0, config.feedback)
