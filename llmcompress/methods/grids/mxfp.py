"""Floats of few bits (OCP Microscaling specification 1.0, arXiv 2310.10537): round to nearest in scaled groups.

Minimises |W - W_approx|^2 for each row and group; needs no data. The specification takes the scale whose exponent is
that of the group's largest magnitude. Here the neighbours of the scale that just covers this magnitude are tried as
well, and the one with the least squared error is stored. A tie between two floats goes to the smaller magnitude.
Stores a `Minifloat`:

- mxfp4, mxfp6, mxfp8: e2m1, e2m3 or e4m3 floats in groups of 32 with e8m0 scales, 4.25, 6.25 or 8.25 bits a weight.
- nvfp4: e2m1 floats in groups of 16 with e4m3 scales, 4.5 bits a weight, and one float32 factor of the matrix, a power
  of two, by which the largest scale lies within the upper range of e4m3.
- fp8, fp8_tensor: e4m3 floats (arXiv 2209.05433) with one bfloat16 scale a row, or one of the matrix, 8 bits a weight.
  Scales from the one that just covers the largest magnitude to twice that are tried.

`gptq` and `sparsegpt` store the same formats with error feedback. A base that was pruned before stays pruned: only what
is kept is fitted and stored.
"""

from typing import Literal

from pydantic import Field

from llmcompress.methods.layer import Layer, StepConfig, base_and_term, join, method, stored_target, with_base
from llmcompress.methods.solvers.floats import LAYOUTS, FloatName, float_sketch, nearest_floats
from llmcompress.weight.nodes import Minifloat, Weight, Where, Zero, shape


class MXFP(StepConfig):
    """Arguments of `mxfp`."""

    method: Literal["mxfp"] = "mxfp"
    format: FloatName = Field("mxfp4", description="of weights and their scales")
    examples = (
        {},
        {"format": "nvfp4"},
        {"format": "mxfp8"},
        {"format": "mxfp6"},
        {"format": "fp8"},
        {"format": "fp8_tensor"},
    )

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return LAYOUTS[self.format].rowwise

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        base, term = base_and_term(approx)
        return join(in_place_of_kept(base, float_sketch(shape(base), LAYOUTS[self.format])), term)


@method("mxfp", MXFP)
def mxfp(layer: Layer, config: MXFP) -> Layer:
    """Round the base to floats of few bits."""
    floats = nearest_floats(stored_target(layer), LAYOUTS[config.format])
    return with_base(layer, in_place_of_kept(base_and_term(layer.approx)[0], floats))


def in_place_of_kept(base: Weight, floats: Minifloat) -> Weight:
    """Return `floats`, within the support of a base that is pruned."""
    match base:
        case Where(index, _, Zero() as outside):
            return Where(index, floats, outside)
    return floats
