"""GPTQ (arXiv 2210.17323): quantize column by column and let later columns make up for the error.

Minimises tr(E H E^T) greedily. Stores a Grid, or with `format` a Minifloat of that format, as `mxfp` does.

Differs from the official code: groups are fitted to weights that carry all earlier feedback, also inside a lazy block.
Act-order uses static groups, so no column index is stored. The clip range is searched, which halves the error at 2
bits. Damping is 0.1, which is better on small calibration sets than 0.01. Scales of floats are searched for alike.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from llmcompress.errors import RecipeError
from llmcompress.methods.grids.mxfp import MXFP
from llmcompress.methods.grids.rtn import RTN, base_sketch, within_support
from llmcompress.methods.layer import Layer, base_target, method, support, with_base
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.floats import LAYOUTS, FloatLayout, FloatName
from llmcompress.methods.solvers.grid import GridConfig, GridFormat
from llmcompress.methods.solvers.hessian import channel_energy, inverse_factor
from llmcompress.methods.solvers.projection import points_of_form
from llmcompress.weight.nodes import Weight


class GPTQ(GridConfig):
    """Arguments of `gptq`."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    act_order: bool = Field(False, description="columns with the most energy first; not on a pruned base")
    format: FloatName | None = Field(None, description="floats of few bits in the place of a grid, as of `mxfp`")
    examples = (
        {"bits": 1},
        {"bits": "ternary"},
        {"bits": "ternary", "scale": "median"},
        {"bits": 2, "group_size": 16},
        {"bits": 3, "group_size": 16, "symmetric": False, "act_order": True},
        {"bits": 4, "clip": False},
        {"bits": 4, "group_size": 16, "narrow_range": True},
        {"format": "mxfp4"},
        {"format": "nvfp4", "act_order": True},
        {"format": "fp8"},
        {"format": "fp8_tensor"},
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in GridConfig.model_fields if getattr(self, name) != fields[name].default]
        if self.format is not None and (own := [name for name in given if name != "method"]):
            raise ValueError(f"format: {self.format} says how weights are stored; drop {', '.join(own)}")
        return self

    def form(self) -> GridFormat | FloatLayout:
        """Return the form of these arguments."""
        return self.grid_format() if self.format is None else LAYOUTS[self.format]

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return self.format is None or LAYOUTS[self.format].rowwise

    def without_inputs(self) -> RTN | MXFP:
        """See `StepConfig.without_inputs`."""
        if self.format is not None:
            return MXFP(format=self.format)
        return RTN(**{name: getattr(self, name) for name in GridConfig.model_fields if name != "method"})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        _check_act_order(approx, self)
        return base_sketch(approx, self.form())


@method("gptq", GPTQ, needs={"outer"})
def gptq(layer: Layer, config: GPTQ) -> Layer:
    """Quantize the base with error feedback; a pruned base stays pruned."""
    _check_act_order(layer.approx, config)
    target = base_target(layer)
    energy = channel_energy(layer.inputs).float()
    order = energy.argsort(descending=True, stable=True) if config.act_order else None
    factor, notes = inverse_factor(layer.inputs, config.damping, order)
    kept = points_of_form(config.form(), target.shape[1], energy, order)
    return with_base(layer, feedback(target, factor, within_support(layer.approx, kept), order), notes)


def _check_act_order(approx: Weight, config: GPTQ) -> None:
    if config.act_order and support(approx) is not None:
        raise RecipeError("act_order does not go with a pruned base; set act_order: false")
