"""Cost of measuring prices: memory and time, from headers and the speed of this machine.

Terms of the time, for t probing tokens, c calibration tokens and L matrices: a pass of c, its moments, and the backward
pass of a recipe that weighs tokens by gradient; a few rough options of every matrix; L half passes of t, and L times
the logits of t. They were fitted to runs (`research/estimates.py`).
"""

from __future__ import annotations

from math import prod

import torch

from llmcompress.allocation.choices import Choices, Matrix
from llmcompress.allocation.distortion import ROWS, rough
from llmcompress.allocation.prices import middle_of, needs_of, run_on, sequences_of, smallest_of
from llmcompress.allocation.sensitivity import WINDOW, WINDOWS
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import peak_bytes, width_of
from llmcompress.compression.step_timing import Trial, speed
from llmcompress.compression.time_estimate import (
    FORWARD_SHARE,
    READ,
    START,
    gradient_operations,
    of_labels,
    of_steps,
    of_text,
    token_shares,
    weights_of,
)
from llmcompress.data.calibration import held_out_count
from llmcompress.methods.layer import MANY, SAMPLED
from llmcompress.recipe.calibration import Calibration
from llmcompress.runtime.precision import fast_float32, product_dtype

FLOAT32 = 4  # bytes
LOGIT = 1e-9  # seconds that a logit takes beside its product: for its log-probability, and in a divergence


def pricing_bytes(job: Job, found: Choices, tokens: int, processes: int = 1) -> int:
    """Return the peak memory of each of some processes that measure prices together, with so many probing tokens."""
    wanted = {one.name: one for one in found.matrices}
    options = {config.method for one in found.matrices for steps in one.options for config in steps}
    tables = [one.name for one in found.matrices if one.is_table]
    walked = peak_bytes(job.source, job.arch, job.recipe, tables, needs_of(job, wanted), options)
    probed = sum(_changes(job, one) for one in found.matrices if not one.is_table)
    exchanged = max((prod(one.shape) for one in found.matrices if not one.is_table), default=0)
    return walked + FLOAT32 * (exchanged + probed * tokens * width_of(job.arch) // processes)


def probing_tokens(text: Calibration) -> int:
    """Return the number of tokens that changes are judged on, where there is as much text as a recipe asks for."""
    length = min(WINDOW, text.length)
    return length * min(WINDOWS, held_out_count(text.held_out, text.samples) * (text.length // length))


@fast_float32()
def pricing_seconds(job: Job, found: Choices, text: Calibration) -> float:
    """Return the time to measure prices, and later the finished model's divergence, by one process."""
    held_out = held_out_count(text.held_out, text.samples)
    tokens = sum(sequences_of(text.samples - held_out, held_out, text.length)) * text.length
    fast, exact = speed(product_dtype(job.recipe.compute, torch.device("cpu"))), speed(torch.float32)
    total = START + of_text() + 4 * READ * job.source.parameters  # for the walk, the probe, and both models at the end
    total += FORWARD_SHARE * _operations(job, tokens) / fast + of_labels(job, tokens)
    return total + _of_trials(job, found, exact) + _of_probing(job, found, probing_tokens(text), fast, exact)


def _operations(job: Job, tokens: int) -> float:
    """Return the operations of the walk's forwards and moments, and of the pass by gradient."""
    shares = token_shares(job)
    total = gradient_operations(job, tokens, shares)
    for layout in job.arch.blocks:
        total += 2 * tokens * weights_of(layout, shares)
        read = (tokens * shares.get(group[0].name, 1.0) * group[0].shape[1] ** 2 for group in layout.groups)
        total += sum(read) / FORWARD_SHARE
    return total


def _of_trials(job: Job, found: Choices, exact: float) -> float:
    """Return the time of what is run on matrices, and of its errors: `exact` operations a second."""
    smallest = smallest_of([one for one in found.matrices if not one.is_table])
    run = {one.name: _trials(one, one is smallest) for one in found.matrices}
    sizes = [(rows, width) for trials in run.values() for _, rows, width in trials]
    errors = sum(4 * (rows if rows < MANY else SAMPLED) * width**2 for rows, width in sizes)
    return of_steps(job, run) + errors / exact


def _trials(one: Matrix, is_reference: bool) -> list[Trial]:
    """Return what is run on a matrix."""
    (rows, width), middle = one.shape, middle_of(one)
    if one.is_table:
        some_rows = [Trial(steps, min(rows, ROWS), width) for steps in one.options]
        return [*some_rows, Trial(rough(one.options[middle]), rows, width)]
    found = [Trial(steps, rows, width) for steps in one.options] if is_reference else []
    for number in run_on(one):
        fast = rough(one.options[number])
        some = number != middle and rows >= MANY and all(config.rowwise for config in fast)
        found.append(Trial(fast, SAMPLED if some else rows, width))
    return found


def _of_probing(job: Job, found: Choices, tokens: int, fast: float, exact: float) -> float:
    """Return the time in which the dense model and every change to it read the probing tokens."""
    changes, shares = {one.name: _changes(job, one) for one in found.matrices}, token_shares(job)
    weights, begun = 0.0, 1  # the dense model goes all the way
    for layout in job.arch.blocks:
        begun += sum(changes.get(linear.name, 0) for group in layout.groups for linear in group)
        weights += begun * weights_of(layout, shares)
    tables = sum(changes[one.name] for one in found.matrices if one.is_table)
    # twice when all is done: the dense and the finished model
    weights += (tables + 2) * sum(weights_of(layout, shares) for layout in job.arch.blocks)
    rows, width = _table(job)
    logits = (begun + tables + 2) * tokens * rows
    reads = tables * READ * job.source.parameters
    return 2 * FORWARD_SHARE * tokens * weights / fast + 2 * logits * width / exact + LOGIT * logits + reads


def _changes(job: Job, one: Matrix) -> int:
    """Return the number of a matrix's changes that are judged."""
    return len(run_on(one)) if job.recipe.damage == "kl" else 1


def _table(job: Job) -> tuple[int, int]:
    rows, width = job.source.tensors[f"{job.arch.embedding}.weight"].shape
    return rows, width
