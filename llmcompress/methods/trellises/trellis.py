"""Trellis-coded quantization (QTIP, arXiv 2406.11235) inside error feedback.

Minimises tr(E H E^T) greedily, column by column as GPTQ does; without data |E|^2, with nothing to feed back. A column
becomes the nearest stream of a trellis, found by the Viterbi algorithm. Stores `TrellisCodes`: `bits` a weight, and a
float16 scale a row. Made for weights that look Gaussian: rotate first. `refine` chooses every column again.

Differs from the paper: streams run down whole columns instead of through tiles of 16 x 16, so that feedback works
weight by weight. A column starts in the state in which the last one ended, so start states are not needed; with `ring`,
in the one in which it ends itself, as the paper's tiles do.
"""

from typing import Literal

import torch
from pydantic import Field

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_target, join, method, term_beside_dense, with_base
from llmcompress.methods.solvers.block_search import TrellisStreams
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.hessian import feedback_factor, metric
from llmcompress.methods.solvers.scales import refit_scales
from llmcompress.weight.nodes import TrellisCodes, Weight, shape
from llmcompress.weight.trellis import Code, Trellis

SHORTEST_RING = 128  # rows; its squared error is that of a long chain


class TrellisConfig(StepConfig):
    """Arguments of `trellis`."""

    method: Literal["trellis"] = "trellis"
    bits: float = Field(
        2, ge=1, le=4, multiple_of=0.5, description="a weight, in halves; these give two weights a step"
    )
    memory: int = Field(12, ge=8, le=16, description="bits of a state: one more doubles the time")
    run: Literal[256, 384, 768] = Field(
        768, description="rows of a stream, which one core searches; the first of them have fewer choices"
    )
    code: Code = Field("table", description="numbers of the states; linear: a few that processors look up fast")
    ring: bool = Field(
        False,
        description="true: a column of a run starts in the state in which it ends, so no two are linked; not in a "
        "matrix of fewer than 128 rows, where chains are nearer",
    )
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = (
        {"memory": 8},
        {"bits": 1, "memory": 8},
        {"bits": 1.5, "memory": 8},
        {"bits": 3, "memory": 8, "run": 256},
        {"bits": 1.5, "memory": 8, "code": "linear"},
        {"bits": 2, "memory": 8, "run": 256, "code": "linear", "ring": True},
    )

    def trellis(self, rows: int) -> Trellis:
        """Return the trellis of columns of so many rows. Raises RecipeError for a memory too short for its bits."""
        values = 1 if self.bits == int(self.bits) else 2
        code = int(self.bits * values)
        if self.memory < 2 * code:
            raise RecipeError(f"{self.bits:g} bits need a memory of at least {2 * code}; set memory: {2 * code}")
        return Trellis(code, values, self.memory, self.code, self.ring and rows >= SHORTEST_RING)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        term = term_beside_dense(approx, "a trellis")
        (rows, width), trellis = shape(approx), self.trellis(shape(approx)[0])
        if rows % trellis.values:
            raise RecipeError(f"{self.bits:g} bits go two rows at a time, and there are {rows}; ask for whole bits")
        codes = torch.empty(rows // trellis.values * width, dtype=torch.uint8, device="meta")
        scale = torch.empty(rows, 1, dtype=torch.float16, device="meta")
        return join(TrellisCodes(codes, scale, trellis, self.run), term)

    def rough(self) -> StepConfig:
        """With the shortest memory; see `StepConfig.rough`."""
        return self.model_copy(update={"memory": min(self.memory, max(8, 2 * self.trellis(0).bits))})


@method("trellis", TrellisConfig, needs={"outer"}, data_free=True, rowwise=True)
def trellis(layer: Layer, config: TrellisConfig) -> Layer:
    """Quantize the base to streams of a trellis, with error feedback, and fit its scales."""
    config.sketch(layer.approx)
    target = base_target(layer)
    factor, notes = feedback_factor(layer.inputs, config.damping)
    kind = config.trellis(len(target))
    spread = target.square().mean(1, keepdim=True).sqrt()  # that of the trellis' numbers is 1
    scale = spread.clamp_max(torch.finfo(torch.float16).max).to(torch.float16)
    base = feedback(target, factor, TrellisStreams(scale, target.shape[1], kind, config.run, layer.rows))
    hessian = metric(layer.inputs, target, config.damping)
    return with_base(layer, refit_scales(base, target, hessian), notes)
