"""Estimate of the time of a run on this machine when it is quiet: steps by trials, the rest by products.

`Work` counts what a run or the pricing of a target does; `Work.seconds` turns it into time.
"""

from __future__ import annotations

import ast
import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from llmcompress.calibration.gradients import count_read
from llmcompress.compression.awq import EXPONENTS
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import gate_tokens, kept_bytes
from llmcompress.compression.plan import TimeEstimate
from llmcompress.compression.step_timing import Steps, Trial, busy_warning, paces, product_speed
from llmcompress.data.generate import ROWS
from llmcompress.methods.layer import MANY, SAMPLED
from llmcompress.models.dense.experts import expert_share
from llmcompress.models.dense.families import BlockLayout
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime.precision import fast_float32, product_dtype

LOG = logging.getLogger("llmcompress")
FORWARD_SHARE = 2.0  # time of a calibration pass over the time of its linears: attention, norms and other work
FACTOR = 2.1  # products of a cube that a factor of H takes as long as
START, READ = 0.2, 1e-8  # seconds that every run takes; and to read a weight, and to write its compressed form
MODULES = 70  # parses of one module of Python's library that take as long as to read the text of this package
BACKWARD = 4  # forwards of a block that its backward pass takes as long as: two, and gradients of inputs
LABEL = 9e-9  # seconds of a logit in that pass, beside its products: its probability, and a draw from it
WRITING, KEPT = 4.0, 3e-10  # time of a written token over that of its products; seconds for a byte of keys and values
ROUNDING = 1.0  # sequences whose forward takes as long as the update of every weight of a block in a step
RELAXING = 2e-8  # seconds to make a weight of a block learn, and to store it again
EXPERT = re.compile(r"(.+)\.(\d+)\.(?:gate|up|down)_proj")


@dataclass(frozen=True)
class Work:
    """Work of a machine.

    `forward`: operations of linears in forwards, in the recipe's dtype. `exact`: operations of float32 products.
    `other`: seconds of everything else.
    """

    forward: float = 0.0
    exact: float = 0.0
    other: float = 0.0

    def __add__(self, more: Work) -> Work:
        return Work(self.forward + more.forward, self.exact + more.exact, self.other + more.other)

    def seconds(self, recipe: Recipe) -> float:
        """Return the time of the work on this machine."""
        exact = self.exact / product_speed(torch.float32)
        return FORWARD_SHARE * self.forward / forward_speed(recipe) + exact + self.other


@fast_float32()
def estimate_time(job: Job, more: Callable[[], float] = lambda: 0.0) -> TimeEstimate:
    """Return the time of a run, from reading the text to the finished checkpoint. Warns on a busy machine.

    `more`: returns the seconds of what comes before it.
    """
    if (note := busy_warning()) is not None:
        LOG.warning(note)
    return TimeEstimate(_run_work(job).seconds(job.recipe) + more(), forward_speed(job.recipe))


def forward_speed(recipe: Recipe) -> float:
    """Return the operations a second of products in the dtype of a recipe's forwards."""
    return product_speed(product_dtype(recipe.compute, torch.device("cpu")))


def _run_work(job: Job) -> Work:
    recipe, text = job.recipe, job.recipe.calibration
    steps = step_seconds(job, {name: [Trial(each, *_size(job, name))] for name, each in job.all_steps.items()})
    work = Work(other=START + READ * job.source.parameters + steps)
    if text is None:
        return work
    tokens, shares = text.samples * text.length, token_shares(job)
    relaxing = RELAXING * sum(_rounds(layout, recipe) * weights_of(layout, {}) for layout in job.arch.blocks)
    work += _writing_work(job)
    blocks = [_block_work(layout, recipe, tokens, shares) for layout in job.arch.blocks]
    work += Work(other=relaxing + text_seconds())
    return sum(blocks, work) + gradient_work(job, text.samples, text.length, shares) + _gate_work(job, shares)


def step_seconds(job: Job, trials: Mapping[str, Sequence[Trial]]) -> float:
    """Return the time of steps on matrices, by their names: linears of one group share a factor."""
    sizes: dict[Steps, set[tuple[int, int]]] = {}
    for steps, rows, width in (trial for each in trials.values() for trial in each):
        sizes.setdefault(steps, set()).add((rows, width))
    known = paces(sizes, job.recipe.calibration is not None)
    groups = [[linear.name for linear in group] for layout in job.arch.blocks for group in layout.groups]
    inside, total = {name for names in groups for name in names}, 0.0
    for names in [*groups, *([name] for name in trials if name not in inside)]:
        together = [trial for name in names for trial in trials.get(name, ())]
        total += sum(known[steps].seconds(rows, width) for steps, rows, width in together)
        total += max((known[steps].cube * width**3 for steps, _, width in together), default=0.0)
    return total


@cache
def text_seconds() -> float:
    """Return the time to read the text of this package, which stands for any text; tried once in a process."""
    source, times = inspect.getsource(inspect), list[float]()
    for _ in range(3):
        started = time.thread_time()
        ast.parse(source)
        times.append(time.thread_time() - started)
    return MODULES * min(times)


def gradient_work(job: Job, sequences: int, length: int, shares: Mapping[str, float]) -> Work:
    """Return the work of the backward pass that weighs tokens or rows; none without it."""
    tokens = prod(count_read(job.recipe.token_weights, sequences, length))
    vocabulary, width = job.source.tensors[f"{job.arch.embedding}.weight"].shape
    head = 2 * 2 * tokens * vocabulary * width / FORWARD_SHARE
    blocks = 2 * BACKWARD * tokens * sum(weights_of(layout, shares) for layout in job.arch.blocks)
    return Work(forward=head + blocks, other=LABEL * tokens * vocabulary)


def _writing_work(job: Job) -> Work:
    """Return the work of the dense model that writes the calibration text; none for any other text."""
    text = job.recipe.calibration
    if text is None or text.dataset != "self":
        return Work()
    tokens = -(-text.samples // ROWS) * ROWS * text.length
    moved = KEPT * kept_bytes(job, ROWS * text.length) / 2 * tokens / ROWS  # at each step, half of them on average
    return Work(exact=WRITING * 2 * tokens * job.source.parameters, other=moved)


def _gate_work(job: Job, shares: Mapping[str, float]) -> Work:
    """Return the work of the dense and the finished model on the text that the gates of quality are measured on."""
    tokens = 0 if job.ungated else gate_tokens(job.recipe)
    if not tokens:
        return Work()
    head = prod(job.source.tensors[f"{job.arch.embedding}.weight"].shape)
    each = FORWARD_SHARE * sum(weights_of(layout, shares) for layout in job.arch.blocks) + head
    return Work(exact=2 * 2 * tokens * each, other=READ * job.source.parameters)


def _block_work(layout: BlockLayout, recipe: Recipe, tokens: int, shares: Mapping[str, float]) -> Work:
    """Return the work of a block's forwards, moments and learning, and of its layers' errors and targets."""
    block, rounds = weights_of(layout, shares), _rounds(layout, recipe)
    aims = recipe.asymmetric > 0 or any(rule.inputs for rule in recipe.rules)  # at outputs for other inputs
    passes = 2 + (recipe.asymmetric > 0 or rounds > 0)
    if recipe.reconstruct is not None and recipe.reconstruct.between:
        passes += len(layout.groups) - 1  # moments of the next group
    forward, exact = 2 * passes * tokens * block + 2 * rounds * _learned_tokens(recipe) * block, 0.0
    for group in layout.groups:
        read = tokens * shares.get(group[0].name, 1.0)
        rows, width = sum(linear.shape[0] for linear in group), group[0].shape[1]
        forward += read * width**2 * (3 if aims else 1) / FORWARD_SHARE  # nothing else is in it
        seen = sum(SAMPLED if linear.shape[0] >= MANY else linear.shape[0] for linear in group)
        exact += 4 * (rows if recipe.exact_errors else seen) * width**2
        if aims:
            exact += min(4 * width**3 + 2 * rows * width**2, 6 * rows * width**2) + FACTOR * width**3
        if recipe.fuse is not None and recipe.fuse.awq:
            exact += 2 * len(EXPONENTS) * rows * width**2
    return Work(forward, exact)


def weights_of(layout: BlockLayout, shares: Mapping[str, float]) -> float:
    """Return the weights of a block's linears, each by its share of the tokens, if it has one."""
    return sum(prod(linear.shape) * shares.get(linear.name, 1.0) for group in layout.groups for linear in group)


def _rounds(layout: BlockLayout, recipe: Recipe) -> int:
    """Return how often a block learns."""
    if (learning := recipe.reconstruct) is None:
        return 0
    return (len(layout.groups) if learning.between else 1) + learning.window - 1


def _learned_tokens(recipe: Recipe) -> float:
    """Return the number of tokens whose forwards take as long as one round of learning of a block."""
    learning, text = recipe.reconstruct, recipe.calibration
    if learning is None or text is None:
        return 0.0
    held_out = text.held_out if text.held_out >= 1 else math.ceil(text.held_out * text.samples)
    steps = learning.steps or (text.samples - held_out) // learning.batch
    looks = 2 + steps // learning.evaluate_every
    return text.length * (3 * steps * (learning.batch + ROUNDING) + looks * held_out)


def _size(job: Job, name: str) -> tuple[int, int]:
    """Return the rows and the width of a linear, or of a table."""
    if name in job.steps:
        return job.arch.linears()[name].shape
    rows, width = job.source.tensors[f"{name}.weight"].shape
    return rows, width


def token_shares(job: Job) -> dict[str, float]:
    """Return the share of tokens that reach each linear of an expert, by module path."""
    experts = [match for name in job.arch.linears() if (match := EXPERT.fullmatch(name))]
    numbers: dict[str, set[str]] = {}
    for match in experts:
        numbers.setdefault(match[1], set()).add(match[2])
    shares = {path: expert_share(job.source.config, len(each)) for path, each in numbers.items()}
    return {match[0]: shares[match[1]] for match in experts}
