"""Vector quantization in the feedback loop (GPTVQ, arXiv 2402.15319; VPTQ, arXiv 2409.17066).

Minimises tr(E H E^T) greedily, without data |E|^2. Vectors of `length` consecutive input columns of a row become
entries of a codebook. k-means places the entries and counts an error as feedback makes it count. Each vector goes to
the entry that is nearest once its error is fed back; at the end entries and scales are fitted to outputs by least
squares. Stores a `Codebook`, or several added up: if `entries` has several numbers, each codebook codes what those
before it leave. A share of the columns, those with the most energy, can stay outside at 8 bits. Made for few bits, and
for weights that look Gaussian: rotate first, which also leaves no outlier columns. `refine` and `pv` choose again.

Differs from the papers: vectors lie along a row (GPTVQ) and not down a column (VPTQ). So one choice sees the Hessian
between its weights, by the whole triangular block of the loop's factor, not its diagonal. A row has one scale, and a
matrix one codebook of at most 256 entries, since a larger one takes more bits than it saves in small matrices.
"""

from typing import Annotated, Literal

from pydantic import Field

from llmcompress.methods.layer import Layer, method
from llmcompress.methods.solvers.codebooks import CodebookConfig, codebook_sketch, quantize_to_codebooks
from llmcompress.weight.nodes import Weight


class VQ(CodebookConfig):
    """Arguments of `vq`."""

    method: Literal["vq"] = "vq"
    length: int = Field(4, ge=1, le=16, description="columns of a vector")
    entries: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field(
        (256,), min_length=1, max_length=4, description="of each codebook; several are added up"
    )
    outliers: float = Field(0, ge=0, le=0.5, description="share of the columns kept at 8 bits")
    examples = (
        {"entries": [16]},
        {"length": 2, "entries": [16, 4]},
        {"length": 3, "entries": [32], "outliers": 0.05},
    )

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return codebook_sketch(approx, self.entries, self.length, self.outliers)


@method("vq", VQ, needs={"outer"}, data_free=True)
def vq(layer: Layer, config: VQ) -> Layer:
    """Quantizes the base to entries of codebooks, vector by vector, with error feedback."""
    return quantize_to_codebooks(layer, config, config.entries, config.length, config.outliers, True)
