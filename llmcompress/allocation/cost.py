"""The memory and time of measuring prices, from headers and the speed of this machine.

The work, for t probing tokens, c calibration tokens and L matrices: a pass of c with its moments, and its backward pass
if tokens are weighed by gradient; a few rough options of every matrix; L half passes of t, and L times the logits of t.
It was fitted to runs (`research/estimates.py`).
"""

from __future__ import annotations

from math import prod

from llmcompress.allocation.choices import Choices, Matrix
from llmcompress.allocation.distortion import FEW, ROWS, is_slow, rough
from llmcompress.allocation.prices import (
    middle_option,
    options_to_run,
    probed_options,
    sequence_counts,
    smallest_matrices,
    statistics_needs,
)
from llmcompress.allocation.sensitivity import WINDOW, WINDOWS
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import COMPILER, FLOAT32, LIBRARIES, head_bytes, peak_bytes, width_of
from llmcompress.compression.step_timing import Trial
from llmcompress.compression.time_estimate import (
    FORWARD_SHARE,
    READ,
    START,
    Work,
    gradient_work,
    step_seconds,
    text_seconds,
    token_shares,
    weights_of,
)
from llmcompress.data.calibration import held_out_count
from llmcompress.methods.layer import MANY, SAMPLED
from llmcompress.recipe.calibration import Calibration
from llmcompress.runtime.precision import fast_float32

EXCHANGED_TABLE = 13  # bytes for each weight of a table while the model is read with another: itself, both, and work
LOGIT = 1e-9  # seconds of a logit beside its product: for its log-probability, and in a divergence


def probing_tokens(text: Calibration) -> int:
    """Return the number of tokens that changes are judged on, if there is as much text as the recipe asks for."""
    length = min(WINDOW, text.length)
    return length * min(WINDOWS, held_out_count(text.held_out, text.samples) * (text.length // length))


def pricing_bytes(job: Job, choices: Choices, tokens: int, processes: int = 1) -> int:
    """Return the peak memory of each of some `processes` that measure prices together, with so many probing tokens."""
    matrices = {matrix.name: matrix for matrix in choices.matrices}
    options = {config.method for matrix in choices.matrices for steps in matrix.options for config in steps}
    tables = [matrix for matrix in choices.matrices if matrix.is_table]
    linears = [matrix for matrix in choices.matrices if not matrix.is_table]
    walked = peak_bytes(job, [table.name for table in tables], statistics_needs(job, matrices), options)
    probed = sum(len(_options_to_probe(job, matrix)) for matrix in linears)
    exchanged = max((prod(matrix.shape) for matrix in linears), default=0)
    changed = FLOAT32 * (exchanged + probed * tokens * width_of(job) // processes)
    rows, width = job.source.tensors[f"{job.arch.embedding}.weight"].shape
    ended = LIBRARIES + COMPILER + changed + FLOAT32 * rows * tokens + head_bytes(rows * width)  # log-probabilities
    read = [table.shape[0] * (FLOAT32 * tokens + EXCHANGED_TABLE * table.shape[1]) for table in tables]
    return max([walked + changed, ended, *(LIBRARIES + COMPILER + each for each in read)])


@fast_float32()
def pricing_seconds(job: Job, choices: Choices, text: Calibration) -> float:
    """Return the time to measure prices, and later the finished model's divergence, by one process."""
    held_out = held_out_count(text.held_out, text.samples)
    sequences = sum(sequence_counts(text.samples - held_out, held_out, text.length))
    tokens = sequences * text.length
    reads = 4 * READ * job.source.parameters  # for the walk, the probe, and both models at the end
    shares = token_shares(job)
    work = Work(_walk_operations(job, tokens, shares), other=START + text_seconds() + reads)
    work += gradient_work(job, sequences, text.length, shares) + _trial_work(job, choices)
    return (work + _probing_work(job, choices, probing_tokens(text), shares)).seconds(job.recipe)


def _walk_operations(job: Job, tokens: int, shares: dict[str, float]) -> float:
    """Return the operations of the walk's forwards and moments."""
    total = 0.0
    for layout in job.arch.blocks:
        total += 2 * tokens * weights_of(layout, shares)
        read = (tokens * shares.get(group[0].name, 1.0) * group[0].shape[1] ** 2 for group in layout.groups)
        total += sum(read) / FORWARD_SHARE
    return total


def _trial_work(job: Job, choices: Choices) -> Work:
    """Return the work of options on matrices, and of their errors."""
    smallest = {matrix.name for matrix in smallest_matrices(choices.matrices).values()}
    trials = {matrix.name: _trials(job, matrix, matrix.name in smallest) for matrix in choices.matrices}
    sizes = [(rows, width) for each in trials.values() for _, rows, width in each]
    errors = sum(4 * (rows if rows < MANY else SAMPLED) * width**2 for rows, width in sizes)
    return Work(exact=errors, other=step_seconds(job, trials))


def _trials(job: Job, matrix: Matrix, is_reference: bool) -> list[Trial]:
    """Return the steps that are run on a matrix."""
    (rows, width), middle = matrix.shape, middle_option(matrix)
    if matrix.is_table:
        some_rows = [Trial(steps, min(rows, ROWS), width) for steps in matrix.options]
        whole = [Trial(rough(matrix.options[number]), rows, width) for number in _options_to_probe(job, matrix)]
        return [*some_rows, *whole]
    trials = []
    if is_reference:
        trials = [Trial(steps, min(rows, FEW) if is_slow(steps) else rows, width) for steps in matrix.options]
    for number in options_to_run(matrix):
        fast = rough(matrix.options[number])
        some = number != middle and rows >= MANY and all(config.rowwise for config in fast)
        slow = number != middle and is_slow(fast)
        trials.append(Trial(fast, min(rows, FEW) if slow else SAMPLED if some else rows, width))
    return trials


def _probing_work(job: Job, choices: Choices, tokens: int, shares: dict[str, float]) -> Work:
    """Return the work of the dense model and of every change to it on the probing tokens."""
    changes = {matrix.name: len(_options_to_probe(job, matrix)) for matrix in choices.matrices}
    weights, begun = 0.0, 1  # the dense model goes all the way
    for layout in job.arch.blocks:
        begun += sum(changes.get(linear.name, 0) for group in layout.groups for linear in group)
        weights += begun * weights_of(layout, shares)
    ends = {matrix.name: changes[matrix.name] for matrix in choices.matrices if matrix.is_table}
    tables = sum(count for name, count in ends.items() if name != job.arch.head)  # the model is read for each
    # twice when all is done: the dense and the finished model
    weights += (tables + 2) * sum(weights_of(layout, shares) for layout in job.arch.blocks)
    rows, width = job.source.tensors[f"{job.arch.embedding}.weight"].shape
    logits = (begun + sum(ends.values()) + 2) * tokens * rows
    reads = tables * READ * job.source.parameters
    return Work(2 * tokens * weights, 2 * logits * width, LOGIT * logits + reads)


def _options_to_probe(job: Job, matrix: Matrix) -> list[int]:
    return probed_options(matrix, job.recipe.damage)
