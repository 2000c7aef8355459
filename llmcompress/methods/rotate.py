"""Incoherence rotation (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456): compress in a random input basis.

Changes nothing by itself: W x = (W R)(R^T x). In the new basis weights look Gaussian and channels have like energy,
so coarse grids fit; costs one bit per input channel (the signs) and a fast Hadamard transform of the inputs at run
time. The remaining steps work on W R with R^T H R; the result is stored as
RotatedInputs. Layers that share an input share the rotation.
"""

from typing import Literal

import torch

from llmcompress.methods.layer import Layer, Rotation, StepConfig, method, rotate_layer
from llmcompress.runtime.seeding import generator
from llmcompress.weight.nodes import RotatedInputs, Weight, shape


class Rotate(StepConfig):
    """Arguments of `rotate`: none. The Hadamard size is the largest power of two that divides the width."""

    method: Literal["rotate"] = "rotate"

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        width = shape(approx)[1]
        return RotatedInputs(approx, torch.empty(width, dtype=torch.bool, device="meta"), hadamard_size(width))


@method("rotate", Rotate, needs={"outer"}, data_free=True, rowwise=True)
def rotate(layer: Layer, config: Rotate) -> Layer:
    """Turn the layer into a seeded random basis."""
    width = layer.weight.shape[1]
    signs = torch.rand(width, dtype=torch.float32, generator=generator("rotate", layer.seed)) < 0.5
    return rotate_layer(layer, Rotation(signs.to(layer.weight.device), hadamard_size(width)))


def hadamard_size(width: int) -> int:
    """Return the largest power of two that divides `width`."""
    return width & -width
