"""Long matrices, such as token tables, compressed in runs of rows, which limits memory; runs may go to other processes.

For methods that compress rows independently (`StepConfig.rowwise`), with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, StepConfig, apply
from llmcompress.weight.algebra import join_rows
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense, device
from llmcompress.weight.nodes import Dense, Weight, shape
from llmcompress.weight.rows import has_rows
from llmcompress.weight.rows import rows as decode_rows

RUN = 7680  # rows: a multiple of a trellis' runs
PIECE = 1024  # rows of a longer run that are decoded at once, at some 40 bytes a weight


class Outcome(NamedTuple):
    """Rows of a matrix after every step: their weight in the model's own basis, and the fallbacks taken."""

    weight: Weight
    notes: tuple[str, ...]


def apply_in_runs(layer: Layer, steps: Sequence[StepConfig]) -> Outcome:
    """Return the layer's weight after every step, in order. Raises the errors of `layer.apply`."""
    return join_runs([*apply_to_runs(layer, steps)])


def runs(rows: int, steps: Sequence[StepConfig]) -> list[slice]:
    """Return the runs in which a matrix of so many rows is compressed."""
    if rows <= RUN or not all(config.rowwise for config in steps):
        return [slice(0, rows)]
    starts = list(range(0, rows, RUN))
    if rows - starts[-1] < RUN / 20:  # half of a trellis' longest run: fewer rows are the end of the stream before
        starts.pop()
    return [slice(start, stop) for start, stop in pairwise([*starts, rows])]


def apply_to_runs(layer: Layer, steps: Sequence[StepConfig]) -> Iterator[Outcome]:
    """Yield the layer's runs after every step."""
    return (apply_to_run(layer, steps, rows) for rows in runs(len(layer.weight), steps))


def apply_to_run(layer: Layer, steps: Sequence[StepConfig], rows: slice) -> Outcome:
    """Return one of the layer's `runs` after every step, which start from its weight in bfloat16."""
    weight, importance = layer.weight[rows], None if layer.rows is None else layer.rows[rows]
    done = apply(replace(layer, weight=weight, approx=Dense(weight.to(torch.bfloat16)), rows=importance), steps)
    return Outcome(done.expression(), done.notes)


def join_runs(done: Sequence[Outcome]) -> Outcome:
    """Return the runs of a layer, one below the other."""
    if len(done) == 1:
        return done[0]
    return Outcome(join_rows([run.weight for run in done]), done[-1].notes)


def decode_in_runs(done: Iterable[Outcome]) -> Iterator[Tensor]:
    """Yield the weights of a layer's runs, float32 `[rows, in]`; one of more rows than others in several pieces."""
    for stored, _ in done:
        places = torch.arange(shape(stored)[0], device=device(stored))
        if len(runs(len(places), ())) == 1 or not has_rows((coded := encode(stored))[0]):
            yield dense(stored)
        else:
            yield from (dense(decode_rows(*coded, rows)) for rows in places.split(PIECE))
