"""One layer: its dense weight -> `Layer` -> methods -> packed weight, and its row of the report."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.job import Job
from llmcompress.errors import NumericsError
from llmcompress.methods.layer import Layer, relative_error, sampled_error
from llmcompress.methods.moments import Moments
from llmcompress.methods.row_chunks import Outcome
from llmcompress.methods.solvers.hessian import inverse_factor, outer_of
from llmcompress.reporting.report import LayerReport
from llmcompress.weight.expression import bits, dense, describe
from llmcompress.weight.modules import PackedWeight, pack_weight
from llmcompress.weight.nodes import Dense

TARGET_DAMPING = 0.1  # of the solve that aims at the dense model's outputs


def layer_of(job: Job, block: Block, name: str, group: InputGroup) -> Layer:
    """Return a linear of the block as methods see it; those that read the same input get the same seed."""
    weight, inputs = block.weight(name), group.inputs
    target = weight
    if inputs.cross is not None:
        try:
            moved = to_dense_outputs(weight, inputs, inputs.cross, len(group.names))
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        target = weight + job.recipe.asymmetric * moved
    seed = f"{job.recipe.seed}/{group.names[0]}"
    return Layer(name, target, Dense(target.to(torch.bfloat16)), inputs, seed, rows=group.rows.get(name))


def to_dense_outputs(weight: Tensor, inputs: Moments, cross: Tensor, readers: int = 1) -> Tensor:
    """Return W D `[out, in]`: W + W D, on the inputs seen, comes closest to W's outputs on the dense model's inputs.

    D = (C - H) inverse(H) with C = X_dense^T X, `cross`, and H = X^T X (GPTAQ, arXiv 2504.02692). `readers`: the layers
    that read X; several share D.
    """

    def moved(left: Tensor | None) -> Tensor:
        gap = (cross - outer_of(inputs)).div_(max(inputs.tokens, 1e-30))
        gap = gap if left is None else left @ gap
        # a factor that is not kept: methods mostly work in another basis, and it is as large as H
        upper, _ = inverse_factor(replace(inputs, derived={}), TARGET_DAMPING)  # inverse(H) = U^T U
        return gap @ upper.T @ upper

    if readers == 1 and len(weight) < weight.shape[1]:
        return moved(weight)
    return weight @ inputs.memo("to_dense_outputs", lambda: moved(None))


def finished(job: Job, layer: Layer, outcome: Outcome, group: InputGroup) -> tuple[PackedWeight, LayerReport]:
    """Return the packed weight of a layer, and its row of the report. Raises NumericsError for NaN or Inf in it."""
    stored = outcome.weight
    row = row_of(job, layer, dense(stored), bits(stored), describe(stored), outcome.notes, group)
    return pack_weight(stored), row


def row_of(
    job: Job, layer: Layer, value: Tensor, count: int, stored: str, notes: tuple[str, ...], group: InputGroup
) -> LayerReport:
    """Return the row of the report for a layer whose weight became `value` `[out, in]`, in `count` bits, which are
    `stored` in words. Raises NumericsError for NaN or Inf in it."""
    measure = relative_error if job.recipe.exact_errors else sampled_error
    error = measure(layer.weight, value, layer.inputs)
    if not error < float("inf"):
        raise NumericsError(f"{layer.name}: the compressed weight holds NaN or Inf; choose other steps for it")
    size = (layer.weight.shape[0], layer.weight.shape[1])
    return LayerReport(
        name=layer.name,
        shape=size,
        steps=tuple(s.method for s in (job.steps | job.tables)[layer.name]),
        bpw=count / prod(size),
        error=error,
        error_heldout=None if group.held_out is None else measure(layer.weight, value, group.held_out),
        fallback="; ".join(notes) or None,
        stored=stored,
        starved=group.starved,
    )
