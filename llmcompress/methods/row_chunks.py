"""Long matrices, such as token tables, compressed a run of rows at a time, so that memory follows the run.

For methods that compress rows independently (`StepConfig.rowwise`): the result is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmcompress.methods.layer import Layer, StepConfig, apply
from llmcompress.weight.nodes import Dense, Weight
from llmcompress.weight.stack import joined

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
