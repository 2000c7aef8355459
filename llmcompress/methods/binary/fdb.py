"""Flexible dual binarization (DB-LLM, arXiv 2402.11960): two {0, 1} planes that start as a 2-bit integer grid.

Minimises tr(E H E^T) in the feedback loop (or |E|^2, columns weighted by their energy, without feedback). Stores two
binary grids with zero points: a weight is one of 0, a1, a2, a1 + a2. An asymmetric 2-bit grid with scale s and zero
point z has just these levels for a1 = +-2s and a2 = +-s, the signs being the bits of z. So with `rounds: 0` the matrix
is that of `gptq` at 2 bits. A round solves for a1 and a2 by least squares, two equations a row and group, and then
moves every code to the nearest level; neither raises the error. Scales are stored positive. Their signs are the zero
points of the planes, one bit each, as many as the grid's; least squares does not change them.

Differs from the paper: the grid's clipping range is searched; planes are fitted in the feedback loop, by least squares,
not by training (`distill` trains them, with the paper's loss `dad`). No official code is published.
"""

from typing import Literal

from pydantic import Field

from llmcompress.methods.layer import Layer, join, method, term_beside_dense
from llmcompress.methods.solvers.bitplanes import (
    PlaneConfig,
    PlaneFormat,
    Planes,
    planes_sketch,
    quantize_to_planes,
)
from llmcompress.weight.nodes import Weight, shape


class FDB(PlaneConfig):
    """Arguments of `fdb`."""

    method: Literal["fdb"] = "fdb"
    group_size: int | None = Field(64, ge=1, description="columns that share scales; null for the whole row")
    examples = (
        {"group_size": 16},
        {"group_size": None},
        {"group_size": 16, "rounds": 0},
        {"group_size": 16, "feedback": False},
    )

    def form(self) -> PlaneFormat:
        """Return the form of these arguments."""
        return PlaneFormat(2, "grid", self.group_size, self.rounds)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return join(planes_sketch(shape(approx), self.form()), term_beside_dense(approx, "a sum of binary planes"))


@method("fdb", FDB, needs={"outer"}, rowwise=True)
def fdb(layer: Layer, config: FDB) -> Layer:
    """Binarize the base in two planes of {0, 1}."""
    return quantize_to_planes(layer, config, lambda energy, _: Planes(config.form(), len(energy), energy))
