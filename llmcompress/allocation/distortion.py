"""The output error that every option leaves in a layer, without running every option on every layer.

Options that differ only in their bits, or only in their sparsity, form a family. A few of each family are run on every
layer, with `StepConfig.rough` steps. All are run, with their own steps, on one small reference layer. A layer's error
is the reference's error times the ratio between the two, which is measured for the options that were run, and
interpolated between them along the logarithm of the reference's error.

This keeps the ranking: a coder's error on a layer is nearly the error that it leaves on Gaussian weights, times how far
the layer's inputs let feedback hide it. Another encoder changes the first factor by the same ratio in all layers,
within a quarter, a sixth of a bit (`tests/allocation/test_prices.py`). More bits change the second one slowly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmcompress.methods.layer import MANY, SAMPLED, Layer, StepConfig, relative_error, sampled_error
from llmcompress.methods.moments import Moments
from llmcompress.methods.row_chunks import apply_in_runs, apply_to_runs, decode_in_runs
from llmcompress.runtime.seeding import generator
from llmcompress.weight.nodes import Dense

Steps = tuple[StepConfig, ...]

MOST_RUN = 3  # options of a family that are run on every layer
ROWS = 2048  # of a table that an error is measured on
FEW = 128  # rows that the error of slow steps is measured on
LEAST = 1e-12  # an error below it counts as this
NOISE = 0.1  # of the size of a matrix that is changed by noise


def families(options: Sequence[Steps]) -> list[list[int]]:
    """Group the numbers of options that differ only in bits, or only in sparsity; the smallest comes first."""
    groups: dict[str, list[tuple[float, int]]] = {}
    for number, steps in enumerate(options):
        values = [config.model_dump(mode="json") for config in steps]
        pruned = [config for config in values if config.get("sparsity") is not None]
        density = -sum(config.pop("sparsity") for config in pruned)
        rate = density if pruned else sum(_bits(config.pop("bits", 0)) for config in values)
        groups.setdefault(repr(values), []).append((rate, number))
    return [[number for _, number in sorted(family)] for family in groups.values()]


def _bits(value: Any) -> float:
    return math.log2(3) if value == "ternary" else float(value or 0)


def options_to_measure(family: Sequence[int]) -> list[int]:
    """Return the options of a family that are run on every layer: both ends, and evenly spaced ones between them."""
    places = np.linspace(0, len(family) - 1, min(MOST_RUN, len(family)))
    return [family[int(place)] for place in places]


def rough(steps: Steps) -> Steps:
    """Return the steps in their fastest form."""
    return tuple(fast for config in steps if (fast := config.rough()) is not None)


def is_slow(steps: Steps) -> bool:
    """True if steps take so long that a few rows have to tell of a matrix."""
    return any(config.is_slow for config in steps)


def sample_rows(layer: Layer, is_table: bool = False) -> Layer:
    """Return a layer of evenly spaced rows of a large one: as many as a report takes, or ROWS of a table."""
    most, enough = (ROWS, ROWS + 1) if is_table else (SAMPLED, MANY)
    return layer if len(layer.weight) < enough else _spaced_rows(layer, most)


def sample_few_rows(layer: Layer) -> Layer:
    """Return a layer of at most FEW evenly spaced rows."""
    return layer if len(layer.weight) <= FEW else _spaced_rows(layer, FEW)


def _spaced_rows(layer: Layer, most: int) -> Layer:
    rows = len(layer.weight)
    chosen = torch.linspace(0, rows - 1, most, device=layer.weight.device).long()
    weight, importance = layer.weight[chosen], None if layer.rows is None else layer.rows[chosen]
    return replace(layer, weight=weight, approx=Dense(weight), rows=importance)


def error(layer: Layer, steps: Steps, held_out: Moments | None) -> float:
    """Return the layer's relative output error after the steps, on held-out inputs; without inputs, of its weights."""
    return max(relative_error(layer.weight, apply_in_runs(layer, steps).weight, held_out), LEAST)


class WeightChange(NamedTuple):
    """A weight `[out, in]` in place of a layer's, and its error, on some rows of a large one."""

    weight: Tensor
    error: float


def compress_roughly(layer: Layer, steps: Steps, held_out: Moments | None) -> WeightChange:
    """Change the layer's weight by the steps."""
    value, done = torch.empty_like(layer.weight), 0
    for run in decode_in_runs(apply_to_runs(layer, steps)):  # one by one: a table may be most of a model
        value[done : done + len(run)] = run
        done += len(run)
    return WeightChange(value, max(sampled_error(layer.weight, value, held_out), LEAST))


def add_noise(layer: Layer, held_out: Moments | None) -> WeightChange:
    """Change the layer's weight by noise of NOISE times its size."""
    weight = layer.weight
    random = generator(layer.seed, layer.name, "noise")
    noise = torch.randn(weight.shape, dtype=torch.float32, generator=random).to(weight)
    value = weight + NOISE * weight.square().mean().sqrt() * noise
    return WeightChange(value, max(sampled_error(weight, value, held_out), LEAST))


def interpolate_errors(
    run: Mapping[int, float], reference_run: Mapping[int, float], reference: Sequence[float]
) -> list[float]:
    """Return a layer's error after every option of a family.

    `run`: its errors after the options that were run on it, by number; `reference_run`: the reference layer's errors
    after the same steps; `reference`: the reference layer's errors after every option with its own steps, by number.
    """
    points = [(reference[number], run[number] / reference_run[number]) for number in run]
    return [value * interpolate_logarithms(points, value) for value in reference]


def interpolate_logarithms(points: Iterable[tuple[float, float]], place: float) -> float:
    """Interpolate a curve through points above 0: linear in both logarithms, constant beyond the ends."""
    logarithms = sorted(((math.log(x), math.log(max(y, LEAST))) for x, y in points), key=lambda point: point[0])
    places, values = zip(*logarithms, strict=True)
    return math.exp(float(np.interp(math.log(place), places, values)))
