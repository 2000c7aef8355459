"""Binary planes whose scales and signs refine each other (ARB-LLM, arXiv 2410.03129): bits are a number of planes.

Minimises tr(E H E^T) in the feedback loop (or |E|^2, columns weighted by their energy, without feedback). Stores a sum
of binary grids: each plane a bit a weight, and a float16 scale a row or group. Scales, by least squares, and signs, to
the nearest of the 2^planes sums, take turns (ARB of any order); at the end scales are fitted to outputs, group by
group (ARB-X). `start: residual` binarizes what the planes before leave, as the paper does; `split` begins with the
best two planes there are, which matters for rows with outliers. `start: residual` and `rounds: 0`
together are plain residual binarization.

Differs from the paper: the scales of a row are solved for at once, not one after the other. Signs are chosen column by
column on weights that carry all earlier feedback. No mean of a row is stored, since there is no node for it. No
bitmap is stored, since the bitmap and the sign of a weight are two planes (see `billm`). No official code is published.

`columns: true` stores a factor for every input column as well (ARB-RC), of any number of planes. The paper fits row and
column scales to the magnitudes of weights alone, which may raise the error of outputs where inputs have loud channels;
here a column's factor is fitted when the loop reaches it, and at the end rows and columns are fitted to outputs in turn
(see `ColumnScales`).
"""

from typing import Literal

from pydantic import Field

from llmcompress.methods.layer import Layer, join, method, term_beside_dense
from llmcompress.methods.solvers.bitplanes import (
    ColumnConfig,
    PlaneFormat,
    Planes,
    planes_sketch,
    quantize_to_planes,
)
from llmcompress.weight.nodes import Weight, shape


class PlanesConfig(ColumnConfig):
    """Arguments of `planes`."""

    method: Literal["planes"] = "planes"
    bits: int = Field(2, ge=1, le=3, description="planes: each a bit a weight, and a scale")
    start: Literal["split", "residual"] = Field(
        "split", description="residual: each plane binarizes what those before it leave; split: the best two first"
    )
    examples = (
        {"bits": 1},
        {"bits": 2},
        {"bits": 3, "group_size": 16},
        {"bits": 2, "start": "residual", "rounds": 0, "feedback": False},
        {"bits": 1, "columns": True},
        {"bits": 2, "columns": True, "group_size": 16},
    )

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return not self.columns

    def form(self) -> PlaneFormat:
        """Return the form of these arguments."""
        return PlaneFormat(self.bits, self.start, self.group_size, self.rounds)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return join(
            self.with_columns(planes_sketch(shape(approx), self.form())),
            term_beside_dense(approx, "a sum of binary planes"),
        )


@method("planes", PlanesConfig, needs={"outer"})
def planes(layer: Layer, config: PlanesConfig) -> Layer:
    """Binarize the base in `bits` planes."""
    return quantize_to_planes(
        layer, config, lambda energy, _: Planes(config.form(), len(energy), energy), config.columns
    )
