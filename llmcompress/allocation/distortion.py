"""The output error that every option leaves in a layer, without running every option on every layer.

Options that differ only in their bits, or only in their sparsity, form a family. A few of each family are run on every
layer, with `StepConfig.rough` steps. All of them are run, with their own steps, on one small reference layer. A layer's
error is the reference's error times the ratio between the two. That ratio is measured for the options that were run,
and interpolated between them along the logarithm of the reference's error.

This keeps the ranking, because a coder's error on a layer is nearly a product of two factors: the error that the coder
leaves on Gaussian weights, and how far the layer's inputs let feedback hide it. Another encoder changes the first
factor by the same ratio in all layers, within a quarter, a sixth of a bit (tests/allocation/test_prices.py). More bits
change the second one slowly, hence the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcompress.methods.layer import MANY, SAMPLED, Layer, StepConfig, apply, relative_error, sampled_error
from llmcompress.methods.moments import Moments
from llmcompress.methods.row_chunks import apply_in_runs
from llmcompress.runtime.seeding import generator
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense

Steps = tuple[StepConfig, ...]

MOST_RUN = 3  # options of a family that are run on every layer
ROWS = 2048  # of a table that an error is measured on
LEAST = 1e-12  # an error below it counts as this
NOISE = 0.1  # of the size of a matrix that is changed by noise


def families(options: Sequence[Steps]) -> list[list[int]]:
    """Group the numbers of the options that differ only in bits, or only in sparsity; what stores least comes first."""
    found: dict[str, list[tuple[float, int]]] = {}
    for number, steps in enumerate(options):
        values = [config.model_dump(mode="json") for config in steps]
        pruned = [one for one in values if one.get("sparsity") is not None]
        kept = -sum(one.pop("sparsity") for one in pruned)
        rate = kept if pruned else sum(_bits(one.pop("bits", 0)) for one in values)
        found.setdefault(repr(values), []).append((rate, number))
    return [[number for _, number in sorted(family)] for family in found.values()]


def _bits(value: Any) -> float:
    return math.log2(3) if value == "ternary" else float(value or 0)


def run_of(family: Sequence[int]) -> list[int]:
    """Return the options of a family that are run on every layer: both ends, and evenly spaced ones between them."""
    places = np.linspace(0, len(family) - 1, min(MOST_RUN, len(family)))
    return [family[int(place)] for place in places]


def rough(steps: Steps) -> Steps:
    """Return the steps in their fastest form."""
    return tuple(fast for config in steps if (fast := config.rough()) is not None)


def sampled(layer: Layer, is_table: bool = False) -> Layer:
    """Return a layer of some rows of this one, evenly spaced, where it has many: of a linear as many as a report takes,
    ROWS of a table."""
    rows = len(layer.weight)
    most, enough = (ROWS, ROWS + 1) if is_table else (SAMPLED, MANY)
    if rows < enough:
        return layer
    chosen = torch.linspace(0, rows - 1, most, device=layer.weight.device).long()
    weight, importance = layer.weight[chosen], None if layer.rows is None else layer.rows[chosen]
    return Layer(layer.name, weight, Dense(weight.to(torch.bfloat16)), layer.inputs, layer.seed, rows=importance)


def error(layer: Layer, steps: Steps, held_out: Moments | None) -> float:
    """Return the layer's relative output error after the steps, on held-out inputs; without inputs, of its weights.

    Raises what `layer.apply` raises.
    """
    stored = apply(layer, steps).expression()
    return max(relative_error(layer.weight, stored, held_out), LEAST)


def changed(layer: Layer, steps: Steps, held_out: Moments | None) -> tuple[Tensor, float]:
    """Return the layer's weight `[out, in]` after the steps, and its error, on some rows where it has many."""
    value = dense(apply_in_runs(layer, steps).weight)
    return value, _made(layer, value, held_out)


def noisy(layer: Layer, held_out: Moments | None) -> tuple[Tensor, float]:
    """Return the layer's weight `[out, in]` with noise of NOISE times its size, and the error that this makes."""
    weight = layer.weight
    noise = torch.randn(weight.shape, generator=generator(layer.seed, layer.name, "noise")).to(weight)
    value = weight + NOISE * weight.square().mean().sqrt() * noise
    return value, _made(layer, value, held_out)


def _made(layer: Layer, value: Tensor, held_out: Moments | None) -> float:
    return max(sampled_error(layer.weight, value, held_out), LEAST)


def interpolated(
    run: Mapping[int, float], reference_run: Mapping[int, float], reference: Sequence[float]
) -> list[float]:
    """Return a layer's error after every option of a family.

    `run`: its errors after the options that were run on it, by number; `reference_run`: the reference layer's errors
    after the same steps; `reference`: the reference layer's errors after every option with its own steps, by number.
    """
    points = [(reference[number], run[number] / reference_run[number]) for number in run]
    return [value * between(points, value) for value in reference]


def between(points: Iterable[tuple[float, float]], place: float) -> float:
    """Interpolate a curve through points above 0 at a place: linear in both logarithms, constant beyond the ends."""
    found = sorted(((math.log(x), math.log(max(y, LEAST))) for x, y in points), key=lambda point: point[0])
    places, values = zip(*found, strict=True)
    return math.exp(float(np.interp(math.log(place), places, values)))
