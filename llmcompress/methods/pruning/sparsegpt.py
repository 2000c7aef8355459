"""SparseGPT (arXiv 2301.00774): prune in the feedback loop, so that kept weights make up for the pruned ones.

Minimises tr(E H E^T) greedily over mask and values; with `bits`, what is kept is quantized in the same loop (joint).
Stores Where(keep, Dense, Grid or Minifloat, Zero). The mask of a block of columns is chosen by w^2 / U_jj^2 when the
loop gets there: over all rows of the block (unstructured), or within every n:m group. Counts are exact, unlike the
official threshold, which prunes one weight and all ties too many.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.floats import LAYOUTS, FloatLayout, FloatName
from llmcompress.methods.solvers.grid import GridFormat
from llmcompress.methods.solvers.hessian import channel_energy, inverse_factor
from llmcompress.methods.solvers.projection import (
    PrunedValues,
    Selection,
    Zeros,
    form_sketch,
    largest,
    largest_of_each,
    points_of_form,
)
from llmcompress.methods.solvers.sparsity import PruneConfig, check_pattern, kept_count, prune_sketch, span_of_choices
from llmcompress.weight.nodes import Weight, shape


class SparseGPT(PruneConfig):
    """Arguments of `sparsegpt`; the last five ask for joint quantization of what is kept."""

    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    bits: int | None = Field(None, ge=1, le=8, description="of what is kept; null: it stays bfloat16")
    group_size: int | None = Field(None, ge=1, description="columns per scale; null for one scale per row")
    symmetric: bool = Field(True, description="levels lie around zero; false: each group stores a zero point too")
    clip: bool = Field(True, description="search the clipping range with the least squared error")
    format: FloatName | None = Field(None, description="of what is kept: floats of few bits, as of `mxfp`")
    examples = (
        {"sparsity": 0.5},
        {"pattern": "2:4"},
        {"pattern": "4:8"},
        {"sparsity": 0.5, "bits": 4},
        {"pattern": "2:4", "bits": 3, "group_size": 16, "symmetric": False},
        {"pattern": "2:4", "format": "fp8"},
        {"sparsity": 0.5, "format": "nvfp4"},
    )

    @model_validator(mode="after")
    def _grid(self) -> Self:
        plain = (self.group_size, self.symmetric, self.clip) == (None, True, True)
        if self.bits is None and not plain:
            raise ValueError("group_size, symmetric and clip are of a grid; give its bits, or leave them out")
        if self.bits == 1 and not self.symmetric:
            raise ValueError("bits: 1 needs symmetric: true")
        if self.bits is not None and self.format is not None:
            raise ValueError("bits are of a grid, and format is of floats; give one of them")
        return self

    def form(self) -> GridFormat | FloatLayout | None:
        """The form of the kept part; None where it stays bfloat16."""
        if self.format is not None:
            return LAYOUTS[self.format]
        return None if self.bits is None else GridFormat(2**self.bits, self.group_size, self.symmetric, self.clip)

    def span(self, width: int) -> int:
        """Columns whose mask is chosen at once; a quantization group lies in one span."""
        structure, form = self.structure(), self.form()
        if structure is not None:
            return structure[1]
        return span_of_choices(1 if form is None else form.group(width), width)

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return self.pattern is not None and (self.format is None or LAYOUTS[self.format].rowwise)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        form = self.form()

        def spans(out: int, width: int) -> list[int]:
            span = self.span(width)
            return [out * min(span, width - start) for start in range(0, width, span)]

        return prune_sketch(approx, self, spans, None if form is None else form_sketch(shape(approx), form))


@method("sparsegpt", SparseGPT, needs={"outer"})
def sparsegpt(layer: Layer, config: SparseGPT) -> Layer:
    """Prunes (and quantizes) column by column with error feedback."""
    target = base_target(layer)
    width = target.shape[1]
    factor, notes = inverse_factor(layer.inputs, config.damping)
    pivots = factor.diagonal().square()[:, None]
    structure = config.structure()

    def choose(current: Tensor, start: int) -> Tensor:
        saliency = current.square() / pivots[start : start + len(current)]
        if structure is not None:
            return largest_of_each(saliency, *structure)
        return largest(saliency, kept_count(current.numel(), config.sparsity or 0.0))

    if structure is not None:
        check_pattern(*structure, width)
    form = config.form()
    span = config.span(width)
    if form is None:
        return with_base(layer, feedback(target, factor, PrunedValues(choose, span, config.index)), notes)
    points = points_of_form(form, width, channel_energy(layer.inputs).float())
    projection = Selection(points, Zeros(), choose, span, config.index)
    return with_base(layer, feedback(target, factor, projection), notes)
