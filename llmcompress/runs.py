"""Long matrices, such as token tables, compressed a run of rows at a time, so that memory follows the run.

For methods that treat every row on its own (`StepConfig.rowwise`): what becomes of a row is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmcompress.layer import Layer, StepConfig, apply
from llmcompress.weight import Dense, Grid, Rotated, Sum, TrellisCoded, Weight, Where, Zero

RUN = 7680  # rows: a multiple of those that a stream of a trellis goes down


def apply_in_runs(layer: Layer, steps: Sequence[StepConfig]) -> Layer:
    """The layer after every step, in order. Raises what `layer.apply` raises."""
    rows = len(layer.weight)
    if rows <= RUN or not all(config.rowwise for config in steps):
        return apply(layer, steps)
    approx: list[Weight] = []
    for start in range(0, rows, RUN):
        weight = layer.weight[start : start + RUN]
        done = apply(replace(layer, weight=weight, approx=Dense(weight.to(torch.bfloat16))), steps)
        approx.append(done.expression())
    return replace(layer, approx=joined(approx), notes=done.notes)


def joined(parts: Sequence[Weight]) -> Weight:
    """The parts, all of one form, below each other."""
    match parts[0]:
        case Zero((_, width)):
            return Zero((sum(part.shape[0] for part in parts if isinstance(part, Zero)), width))
        case Dense():
            return Dense(torch.cat([part.values for part in parts if isinstance(part, Dense)]))
        case Grid(zero=zero) as first:
            grids = [part for part in parts if isinstance(part, Grid)]
            codes, scale = torch.cat([grid.codes for grid in grids]), torch.cat([grid.scale for grid in grids])
            zeros = None if zero is None else torch.cat([grid.zero for grid in grids if grid.zero is not None])
            return replace(first, codes=codes, scale=scale, zero=zeros)
        case TrellisCoded() as first:
            coded = [part for part in parts if isinstance(part, TrellisCoded)]
            codes, scale = torch.cat([part.codes for part in coded]), torch.cat([part.scale for part in coded])
            return replace(first, codes=codes, scale=scale)
        case Where(index):
            choices = [part for part in parts if isinstance(part, Where)]
            if index.inside.ndim == 2:
                index = replace(index, inside=torch.cat([part.index.inside for part in choices]))
            inside, outside = joined([part.inside for part in choices]), joined([part.outside for part in choices])
            return Where(index, inside, outside)
        case Sum(terms):
            sums = [part.parts for part in parts if isinstance(part, Sum)]
            return Sum(tuple(joined([each[term] for each in sums]) for term in range(len(terms))))
        case Rotated() as first:
            return replace(first, inner=joined([part.inner for part in parts if isinstance(part, Rotated)]))
    raise TypeError(f"joined has no rule for {type(parts[0]).__name__}")
