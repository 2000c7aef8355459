"""Input statistics presumed from the weights, for when there is no calibration: a channel's energy from its weights.

Changes nothing by itself. Training keeps a channel's weights small where its inputs are large, since their product
counts; so channel j is presumed to have the energy `1 / (mean |w_ij| over i)^2`, uncorrelated with all others. Later
steps then weigh and feed back errors as with data. Feedback requires a rotated basis for that, in which the presumed
second moment is no longer diagonal. Measured moments are kept. A presumption of this project, not of a paper.

On layers of SmolLM2 at 3 rotated bits the output error falls by a quarter under error feedback alone, by two fifths
with trellises, by two thirds at v; true statistics take away five sixths. Not for token tables, where it rises
fourfold: their weights follow words too.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, StepConfig, method
from llmcompress.methods.moments import Moments
from llmcompress.weight.nodes import Weight

FLOOR = 0.1  # of the mean magnitude: a channel with smaller weights may as well be one that is never used


class Presume(StepConfig):
    """Arguments of `presume`: none. It goes before `rotate`."""

    method: Literal["presume"] = "presume"

    @property
    def presumes(self) -> bool:
        """See `StepConfig.presumes`."""
        return True

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return approx


@method("presume", Presume)
def presume(layer: Layer, config: Presume) -> Layer:
    """Give the layer presumed moments, if it has none."""
    if layer.inputs.outer is not None:
        return replace(layer)
    energy = presumed_energy(layer.weight)
    return replace(layer, inputs=Moments(1.0, square=energy, outer=torch.diag(energy)))


def presumed_energy(weight: Tensor) -> Tensor:
    """Return the presumed energy of every input channel `[in]` of `weight [out, in]`, float32, of mean 1."""
    size = weight.abs().mean(0)
    floor = FLOOR * size.mean()
    energy = torch.where(floor > 0, size.clamp_min(floor), 1.0).square().reciprocal()
    return energy / energy.mean()
