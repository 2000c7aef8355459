"""RTN: every weight goes to the nearest point of its group's grid.

Minimises |W - W_approx|^2 (the clip range by search); needs no data. Stores a Grid. The baseline of every
quantization method. A base that was pruned before stays pruned: only what is kept is fitted and stored.
"""

from typing import Literal

from llmcompress.methods.layer import Layer, base_and_term, join, method, stored_target, support, with_base
from llmcompress.methods.solvers.feedback import Projection, feedback
from llmcompress.methods.solvers.floats import FloatLayout
from llmcompress.methods.solvers.grid import GridConfig, GridFormat
from llmcompress.methods.solvers.projection import FloatPoints, GridPoints, Selection, Zeros, form_sketch
from llmcompress.weight.nodes import Weight, Where, shape


class RTN(GridConfig):
    """Arguments of `rtn`."""

    method: Literal["rtn"] = "rtn"
    examples = (
        {"bits": 1},
        {"bits": "ternary"},
        {"bits": "ternary", "scale": "absmean"},
        {"bits": 2, "group_size": 16},
        {"bits": 3, "symmetric": False},
        {"bits": 8, "clip": False},
    )

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return base_sketch(approx, self.grid_format())


@method("rtn", RTN, rowwise=True)
def rtn(layer: Layer, config: RTN) -> Layer:
    """Round to nearest, without feedback."""
    target = stored_target(layer)
    kept = GridPoints(config.grid_format(), target.shape[1])
    return with_base(layer, feedback(target, None, within_support(layer.approx, kept)))


def within_support(approx: Weight, points: GridPoints | FloatPoints) -> Projection:
    """Return a projection to `points`, or to zero where an earlier step pruned."""
    base = base_and_term(approx)[0]
    keep = support(approx)
    if keep is None or not isinstance(base, Where):
        return points
    index = base.index
    return Selection(
        points, Zeros(), lambda now, start: keep.T[start : start + len(now)], keep.shape[1], lambda _: index
    )


def base_sketch(approx: Weight, form: GridFormat | FloatLayout) -> Weight:
    """Return the base in that form without values; a pruned base stays pruned."""
    base, term = base_and_term(approx)
    kept = form_sketch(shape(base), form)
    return join(kept if support(approx) is None else Where(base.index, kept, base.outside), term)  # type: ignore[union-attr]
