"""Alternating steps of PV-Tuning (arXiv 2405.14852) on one layer's output error, where the paper tunes a whole model.

Polishes codebooks and never raises the loss. Minimises tr(E H E^T) by two kinds of steps in turn: all scales and
entries by least squares (P), and the codes of a small share of each row's vectors, those that gain most with all others
fixed (V). These codes change together, if that lowers the loss of their row; otherwise the best of them changes alone.
Stores what was there, in the same bits.

On the whole model's loss, as in the paper, neither the gain of a code nor its best entry is known, and a code follows
the gradient; on a layer both are computed. `refine` instead visits every vector in order.
"""

from typing import Literal

from pydantic import Field

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, method, with_base
from llmcompress.methods.solvers.hessian import metric
from llmcompress.methods.solvers.scales import refit_scales
from llmcompress.methods.solvers.vectors import books_of, change_vectors, move_codebooks
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Weight, Where

SHARE = 0.1  # of the vectors of a row that may change in a step


class PV(StepConfig):
    """Arguments of `pv`."""

    method: Literal["pv"] = "pv"
    steps: int = Field(4, ge=1, le=1000, description="of each kind")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        _coded_base(approx)
        return approx

    def rough(self) -> None:
        """Nothing; see `StepConfig.rough`."""


@method("pv", PV, needs={"outer"}, data_free=True)
def pv(layer: Layer, config: PV) -> Layer:
    """The base with better codes, entries and scales, in the same bits."""
    base, target = _coded_base(layer.approx), base_target(layer)
    hessian = metric(layer.inputs, target, config.damping)
    for _ in range(config.steps):
        base = move_codebooks(base, target, lambda books, own, shown: change_vectors(books, own, hessian, shown, SHARE))
        base = refit_scales(base, target, hessian)
    return with_base(layer, base)


def _coded_base(approx: Weight) -> Weight:
    base = base_and_term(approx)[0]
    if not books_of(base.outside if isinstance(base, Where) else base):
        raise RecipeError(f"there are no codebooks in {describe(base)}; make them before, as by vq")
    return base
