"""Long matrices, such as token tables, compressed in runs of rows, which limits memory; runs may go to other processes.

For methods that compress rows independently (`StepConfig.rowwise`), with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch

from llmcompress.methods.layer import Layer, StepConfig, apply
from llmcompress.weight.algebra import join_rows
from llmcompress.weight.nodes import Dense, Weight

RUN = 7680  # rows: a multiple of a trellis' runs


class Outcome(NamedTuple):
    """Rows of a matrix after every step: their weight in the model's own basis, and the fallbacks taken."""

    weight: Weight
    notes: tuple[str, ...]


def apply_in_runs(layer: Layer, steps: Sequence[StepConfig]) -> Outcome:
    """Return the layer's weight after every step, in order. Raises the errors of `layer.apply`."""
    return join_runs([apply_to_run(layer, steps, rows) for rows in runs(len(layer.weight), steps)])


def runs(rows: int, steps: Sequence[StepConfig]) -> list[slice]:
    """Return the runs in which a matrix of so many rows is compressed."""
    if rows <= RUN or not all(config.rowwise for config in steps):
        return [slice(0, rows)]
    starts = list(range(0, rows, RUN))
    if rows - starts[-1] < RUN / 20:  # half of a trellis' longest run: fewer rows are the end of the stream before
        starts.pop()
    return [slice(start, stop) for start, stop in pairwise([*starts, rows])]


def apply_to_run(layer: Layer, steps: Sequence[StepConfig], rows: slice) -> Outcome:
    """Return one of the layer's `runs` after every step."""
    if rows != slice(0, len(layer.weight)):
        weight = layer.weight[rows]
        importance = None if layer.rows is None else layer.rows[rows]
        layer = replace(layer, weight=weight, approx=Dense(weight.to(torch.bfloat16)), rows=importance)
    done = apply(layer, steps)
    return Outcome(done.expression(), done.notes)


def join_runs(done: Sequence[Outcome]) -> Outcome:
    """Return the runs of a layer, one below the other."""
    if len(done) == 1:
        return done[0]
    return Outcome(join_rows([run.weight for run in done]), done[-1].notes)
