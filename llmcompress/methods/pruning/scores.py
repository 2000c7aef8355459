"""Pruning by a score: the weights with the largest scores stay as they are, all others become zero.

A score is kept where it is among the largest of the layer, of its row (`wanda`), or of its n:m group. Stores
Where(keep, Dense, Zero).
"""

from typing import Literal

import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, base_target, method, with_base
from llmcompress.methods.solvers.hessian import channel_energy
from llmcompress.methods.solvers.sparsity import PruneConfig, keep_largest, keep_largest_of_rows, prune, prune_sketch
from llmcompress.runtime.seeding import generator
from llmcompress.weight.nodes import Weight


class Magnitude(PruneConfig):
    """Arguments of `magnitude`."""

    method: Literal["magnitude"] = "magnitude"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"})


@method("magnitude", Magnitude)
def magnitude(layer: Layer, config: Magnitude) -> Layer:
    """Magnitude pruning: the smallest weights of the layer, or of each n:m group, become zero.

    Minimises |W - W_approx|^2; needs no data. Stores Where(keep, Dense, Zero). The baseline of every pruning method.
    """
    target = base_target(layer)
    return with_base(layer, prune(target, keep_largest(target.abs(), config), config))


class RandomMask(PruneConfig):
    """Arguments of `random_mask`."""

    method: Literal["random_mask"] = "random_mask"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"})


@method("random_mask", RandomMask)
def random_mask(layer: Layer, config: RandomMask) -> Layer:
    """Random pruning: the control that every other choice of weights has to beat (arXiv 2202.02643).

    Needs no data, and the same seed gives the same weights. Stores Where(keep, Dense, Zero). Random masks with sensible
    shares for the layers come near to chosen ones in large networks that are trained afterwards.
    """
    target, random = base_target(layer), generator(layer.seed, layer.name, "mask")
    scores = torch.rand(target.shape, dtype=torch.float32, generator=random).to(target.device)
    return with_base(layer, prune(target, keep_largest(scores, config), config))


class DIMAP(PruneConfig):
    """Arguments of `dimap`."""

    method: Literal["dimap"] = "dimap"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"})


@method("dimap", DIMAP)
def dimap(layer: Layer, config: DIMAP) -> Layer:
    """DIMAP's score (arXiv 2404.13648; LAMP, arXiv 2010.07611) within a layer, by columns and magnitudes.

    A weight's score is its share of the weights that are left in its unit once all smaller ones are gone: |w| over the
    sum of |w| of those not smaller, the relative distortion of removing it. Within a unit the order is that of
    magnitudes. Between units sizes do not matter, and the largest weight of each unit scores 1. Needs no data. Stores
    Where(keep, Dense, Zero).

    Differs from the papers: their units are layers, among which the score distributes sparsity; here a recipe states
    the sparsity of a layer, and a unit is an input channel, a column. Their sums are of squares; here of magnitudes.
    The reason for columns: a model makes a channel's weights small where its inputs are large, so magnitudes alone
    prune the weights that matter; the score does not change when a channel is rescaled. On layers of SmolLM2 at half
    the weights, the output error is 0.75 of that of magnitude pruning; with squares 0.9, with rows for units 1.06.
    """
    target = base_target(layer)
    return with_base(layer, prune(target, keep_largest(shares_of_columns(target), config), config))


def shares_of_columns(weight: Tensor) -> Tensor:
    """Return `dimap`'s score `[out, in]`, 0..1. Of equal weights the first scores higher; zeros score 0."""
    magnitudes, order = weight.abs().sort(dim=0, descending=True, stable=True)
    shares = torch.where(magnitudes > 0, magnitudes / magnitudes.cumsum(0), 0.0)
    return torch.zeros_like(shares).scatter_(0, order, shares)


class Wanda(PruneConfig):
    """Arguments of `wanda`."""

    method: Literal["wanda"] = "wanda"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return prune_sketch(approx, self, lambda out, width: [width] * out)


@method("wanda", Wanda, needs={"outer"}, rowwise=True)
def wanda(layer: Layer, config: Wanda) -> Layer:
    """Wanda (arXiv 2306.11695): prune by |w| times the norm of its input channel, row by row.

    Exactly minimises the output error for uncorrelated inputs when weights are only dropped, not updated. Stores
    Where(keep, Dense, Zero). Every row keeps the same number of weights.
    """
    target = base_target(layer)
    norms = channel_energy(layer.inputs).sqrt().float()
    return with_base(layer, prune(target, keep_largest_of_rows(target.abs() * norms, config), config))


class Relevance(PruneConfig):
    """Arguments of `relevance`."""

    method: Literal["relevance"] = "relevance"
    examples = ({"sparsity": 0.5}, {"pattern": "2:4"})


@method("relevance", Relevance, needs={"outer"})
def relevance(layer: Layer, config: Relevance) -> Layer:
    """Pruning by relevance: the weights through which least of the predictions flows (after LRP, arXiv 1912.08881).

    The relevance of a weight for a token is w_ij x_j g_i, with the input x and the loss's gradient g by the output.
    Over a row's inputs it sums to the relevance of that output, so none is lost between layers. A weight is judged by
    the root mean square of it over tokens, with the means of x_j^2 and g_i^2 taken apart. These are the moments of the
    inputs, and the rows' importance that `token_weights: {by: gradient, rows: true}` measures; without it all rows
    count alike. Stores Where(keep, Dense, Zero). Rows compete with each other, unlike in `wanda`.
    """
    target = base_target(layer)
    return with_base(layer, prune(target, keep_largest(relevance_of(layer, target), config), config))


def relevance_of(layer: Layer, weight: Tensor) -> Tensor:
    """Return the root mean square relevance `[out, in]` of the weights of a layer."""
    scores = weight.abs() * channel_energy(layer.inputs).sqrt().float()
    return scores if layer.rows is None else scores * layer.rows.sqrt().to(scores)[:, None]
