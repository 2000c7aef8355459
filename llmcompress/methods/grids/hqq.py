"""HQQ (half-quadratic quantization, Badri and Shaji 2023, Mobius Labs): grids for most weights, not for the largest.

Minimises the sum of |w - w_approx|^p with p below 1, to which outliers matter less than to squares; needs no data. It
does so by half-quadratic splitting, in rounds. The proximal step `e = sign(x) max(|x| - |x|^(p-1) / beta, 0)` puts a
part of each error down to outliers. The grid is fitted by least squares to the weights without that part, codes go to
the nearest points, and beta grows. A group starts from the grid of `rtn` and keeps the best grid it met, so its sum is
never above that of `rtn`. Stores a Grid, in the bits of an asymmetric one of `rtn`.

Differs from the official code: zero points are whole codes, as a Grid stores them. A 16-bit zero point was measured
against smaller groups in the same bits, and lost at 2 and 3 bits. Whole zero points alone can hardly move, so the scale
is solved for too. Errors are counted in steps of the grid, so that the result does not depend on the weights' unit. The
gain is one of weights, not of outputs: on layers of SmolLM2 the output error rises as p falls, at p = 0.7 to 1.1 to 1.3
times that of `rtn` with its search for least squares; at p = 2 it is 1 to 6 % below.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.grids.rtn import RTN, within_support
from llmcompress.methods.layer import Layer, StepConfig, method, stored_target, with_base
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.grid import GridFormat, fit_grid, reciprocal
from llmcompress.methods.solvers.projection import GridPoints
from llmcompress.weight.nodes import Weight

ROUNDS = 20  # these three as in the official code
BETA = 10.0
GROWTH = 1.01


class HQQ(StepConfig):
    """Arguments of `hqq`."""

    method: Literal["hqq"] = "hqq"
    bits: int = Field(4, ge=2, le=8, description="per weight")
    group_size: int | None = Field(64, ge=1, description="columns per scale and zero; null for one each per row")
    norm: float = Field(0.7, gt=0, le=2, description="p of |w - w_approx|^p; 2 is least squares")
    examples = ({"bits": 2, "group_size": 16}, {"bits": 3}, {"bits": 4, "group_size": None, "norm": 2})

    def start(self) -> RTN:
        """Return the `rtn` step whose grids it starts from, which stores the same bits."""
        return RTN(bits=self.bits, group_size=self.group_size, symmetric=False)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return self.start().sketch(approx)


class Proximal(GridPoints):
    """Grid points; each group's grid is solved for when it is reached."""

    def __init__(self, form: GridFormat, width: int, norm: float) -> None:
        super().__init__(form, width)
        self.norm = norm

    def _fit(self, current: Tensor, start: int, shown: Tensor | None) -> None:
        columns = slice(start, start + self.group_size)
        values, counted = current[columns].T.contiguous(), None if shown is None else shown[columns].T
        scale, zero = fit_grid(values, self.form, None, counted)
        if zero is not None:
            scale, zero = fit_to_norm(values, scale, zero, self.form.levels, self.norm, counted)
        self._add(scale, zero)


@method("hqq", HQQ, rowwise=True)
def hqq(layer: Layer, config: HQQ) -> Layer:
    """Round to nearest on grids fitted to the norm; a pruned base stays pruned."""
    target = stored_target(layer)
    kept = Proximal(config.start().grid_format(), target.shape[1], config.norm)
    return with_base(layer, feedback(target, None, within_support(layer.approx, kept)))


def fit_to_norm(
    weight: Tensor, scale: Tensor, zero: Tensor, levels: int, norm: float, shown: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scale float16 and zero uint8, `[rows, 1]`, with the lowest sum of |w - w_approx|^norm met.

    The rounds for `weight [rows, columns]` start from `scale` and `zero`; only entries with `shown [rows, columns]`
    count.
    """
    counted = torch.ones_like(weight) if shown is None else shown.to(weight.dtype)
    best = (scale, zero)
    least = torch.full_like(scale, torch.inf, dtype=torch.float32)
    beta = BETA
    for _ in range(ROUNDS):
        middle = zero.float()
        scaled = weight * reciprocal(scale)  # everything from here on in steps of the grid
        points = (scaled + middle).round_().clamp_(0, levels - 1).sub_(middle)
        error = scaled - points
        size = error.abs().clamp_min_(1e-8)  # whose power is finite
        power = size.pow(norm - 1)
        lost = (size * power * counted).sum(1, keepdim=True) * scale.float().pow(norm)
        better = lost < least
        least = torch.where(better, lost, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        outlier = error.sign() * (size - power / beta).clamp_min_(0)
        scale, zero = _fit_to_codes(scaled - outlier, points + middle, scale, counted, levels)
        beta *= GROWTH
    return best


def _fit_to_codes(target: Tensor, codes: Tensor, scale: Tensor, counted: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale, and the zero that brings `codes [rows, columns]` nearest to `target` on average.

    `target` is in steps of `scale`.
    """
    middle = ((codes - target) * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
    zero = middle.round_().clamp_(0, levels - 1)
    points = (codes - zero) * counted
    energy = (points * points).sum(1, keepdim=True)
    gain = (points * target).sum(1, keepdim=True) / energy.clamp_min(1e-30)
    wanted = (scale.float() * gain).clamp_max_(torch.finfo(torch.float16).max).to(torch.float16)
    return torch.where(wanted > 0, wanted, scale), zero.to(torch.uint8)
