"""Long matrices, such as token tables, compressed a run of rows at a time, so that memory follows the run.

For methods that compress rows independently (`StepConfig.rowwise`): the result is the same either way. Runs may be
compressed in different places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from llmcompress.methods.layer import Layer, StepConfig, apply
from llmcompress.weight.algebra import join_rows
from llmcompress.weight.nodes import Dense, Weight

RUN = 7680  # rows: a multiple of those that a stream of a trellis goes down


class Outcome(NamedTuple):
    """Rows of a matrix after every step: their weight in the model's own basis, and the fallbacks taken."""

    weight: Weight
    notes: tuple[str, ...]


def apply_in_runs(layer: Layer, steps: Sequence[StepConfig]) -> Outcome:
    """The layer's weight after every step, in order. Raises what `layer.apply` raises."""
    return join_runs([apply_to_run(layer, steps, rows) for rows in runs(len(layer.weight), steps)])


def runs(rows: int, steps: Sequence[StepConfig]) -> list[slice]:
    """Return the runs in which a matrix of so many rows is compressed; one, of all rows, where that is so."""
    if rows <= RUN or not all(config.rowwise for config in steps):
        return [slice(0, rows)]
    return [slice(start, min(start + RUN, rows)) for start in range(0, rows, RUN)]


def apply_to_run(layer: Layer, steps: Sequence[StepConfig], rows: slice) -> Outcome:
    """One of the layer's `runs` after every step."""
    if rows != slice(0, len(layer.weight)):
        weight = layer.weight[rows]
        importance = None if layer.rows is None else layer.rows[rows]
        layer = replace(layer, weight=weight, approx=Dense(weight.to(torch.bfloat16)), rows=importance)
    done = apply(layer, steps)
    return Outcome(done.expression(), done.notes)


def join_runs(done: Sequence[Outcome]) -> Outcome:
    """The runs of a layer below each other."""
    if len(done) == 1:
        return done[0]
    return Outcome(join_rows([run.weight for run in done]), done[-1].notes)
