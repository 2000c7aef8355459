"""Estimate of a run's time on this machine: steps by trials of parts of matrices, what surrounds them by its products.

Products are counted at the speed that they have on this machine when it is quiet.
"""

from __future__ import annotations

import ast
import inspect
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from math import prod

import torch

from llmcompress.compression.fuse.awq import EXPONENTS
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import by_gradient, gate_tokens
from llmcompress.compression.step_timing import Steps, Trial, busy, paces, speed
from llmcompress.methods.layer import MANY, SAMPLED
from llmcompress.models.dense.families import BlockLayout
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime.precision import fast_float32, product_dtype

LOG = logging.getLogger("llmcompress")
FORWARD_SHARE = 2.0  # time of a calibration pass over the time of its linears: attention, norms and other work
FACTOR = 2.1  # products of a cube that a factor of H takes as long as
START, READ = 0.2, 1e-8  # seconds that every run takes; and to read a weight, and to write what becomes of it
MODULES = 240  # parses of one module of Python's library that take as long as to read the text that this package brings
BACKWARD = 4  # forwards of a block that the pass for its importance takes as long as: two, and gradients of inputs
LABEL = 9e-9  # seconds that a logit takes in that pass, beside its products: for its probability, and to draw from it
ROUNDING = 1.0  # sequences whose forward takes as long as what a step does to every weight of a block
RELAXING = 2e-8  # seconds to make a weight of a block learn, and to store it again
EXPERT = re.compile(r"(.+)\.(\d+)\.(?:gate|up|down)_proj")
EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


@fast_float32()
def seconds(job: Job) -> float:
    """Return the time of a run, from reading the text to the finished checkpoint. Warns on a busy machine."""
    recipe = job.recipe
    if (note := busy()) is not None:
        LOG.warning(note)
    total = START + READ * job.source.parameters
    total += of_steps(job, {name: [Trial(each, *_size(job, name))] for name, each in (job.steps | job.tables).items()})
    if recipe.calibration is None:
        return total
    tokens = recipe.calibration.samples * recipe.calibration.length
    forward, exact = _operations(job, tokens, token_shares(job))
    fast = speed(product_dtype(recipe.compute, torch.device("cpu")))
    total += of_labels(job, tokens)
    total += RELAXING * sum(_rounds(layout, recipe) * weights_of(layout, {}) for layout in job.arch.blocks)
    return total + of_text() + FORWARD_SHARE * forward / fast + exact / speed(torch.float32) + _of_gates(job)


def of_steps(job: Job, run: Mapping[str, Sequence[Trial]]) -> float:
    """Return the time of what is run on matrices, by their names: linears of one group share a factor."""
    sizes: dict[Steps, set[tuple[int, int]]] = {}
    for steps, rows, width in (trial for each in run.values() for trial in each):
        sizes.setdefault(steps, set()).add((rows, width))
    known = paces(sizes, job.recipe.calibration is not None)
    groups = [[linear.name for linear in group] for layout in job.arch.blocks for group in layout.groups]
    inside, total = {name for names in groups for name in names}, 0.0
    for names in [*groups, *([name] for name in run if name not in inside)]:
        trials = [trial for name in names for trial in run.get(name, ())]
        total += sum(known[steps].seconds(rows, width) for steps, rows, width in trials)
        total += max((known[steps].cube * width**3 for steps, _, width in trials), default=0.0)
    return total


def of_text() -> float:
    """Return the time to read the text that this package brings, for any other as well."""
    source, times = inspect.getsource(inspect), list[float]()
    for _ in range(3):
        started = time.perf_counter()
        ast.parse(source)
        times.append(time.perf_counter() - started)
    return MODULES * min(times)


def of_labels(job: Job, tokens: int) -> float:
    """Return the time of what the pass by gradient does to logits; 0 without it."""
    vocabulary = job.source.tensors[f"{job.arch.embedding}.weight"].shape[0]
    return LABEL * tokens * vocabulary if by_gradient(job.recipe) else 0.0


def _of_gates(job: Job) -> float:
    """Return the time in which the dense and the finished model read what the gates of quality are measured on."""
    tokens = 0 if job.ungated else gate_tokens(job.recipe)
    if not tokens:
        return 0.0
    shares = token_shares(job)
    head = prod(job.source.tensors[f"{job.arch.embedding}.weight"].shape)
    each = FORWARD_SHARE * sum(weights_of(layout, shares) for layout in job.arch.blocks) + head
    return READ * job.source.parameters + 2 * 2 * tokens * each / speed(torch.float32)


def _operations(job: Job, tokens: int, shares: Mapping[str, float]) -> tuple[float, float]:
    """Return the operations of forwards and moments, and those of products that stay precise."""
    recipe = job.recipe
    forward, exact = 0.0, 0.0
    for layout in job.arch.blocks:
        block, rounds = weights_of(layout, shares), _rounds(layout, recipe)
        passes = 2 + (recipe.asymmetric > 0 or rounds > 0)
        if recipe.reconstruct is not None and recipe.reconstruct.between:
            passes += len(layout.groups) - 1  # moments of the next group
        forward += 2 * passes * tokens * block
        for group in layout.groups:
            read = tokens * shares.get(group[0].name, 1.0)
            rows, width = sum(linear.shape[0] for linear in group), group[0].shape[1]
            forward += read * width**2 * (3 if recipe.asymmetric else 1) / FORWARD_SHARE  # nothing else is in it
            seen = sum(SAMPLED if linear.shape[0] >= MANY else linear.shape[0] for linear in group)
            exact += 4 * (rows if recipe.exact_errors else seen) * width**2
            if recipe.asymmetric:
                exact += min(4 * width**3 + 2 * rows * width**2, 6 * rows * width**2) + FACTOR * width**3
            if recipe.fuse is not None and recipe.fuse.awq:
                exact += 2 * len(EXPONENTS) * rows * width**2
        forward += 2 * rounds * _learned(recipe) * block
    return forward + gradient_operations(job, tokens, shares), exact


def gradient_operations(job: Job, tokens: int, shares: Mapping[str, float]) -> float:
    """Return the operations of the pass by gradient, counted as those of forwards; 0 without it."""
    if not by_gradient(job.recipe):
        return 0.0
    head = 2 * 2 * tokens * prod(job.source.tensors[f"{job.arch.embedding}.weight"].shape) / FORWARD_SHARE
    return head + 2 * BACKWARD * tokens * sum(weights_of(layout, shares) for layout in job.arch.blocks)


def weights_of(layout: BlockLayout, shares: Mapping[str, float]) -> float:
    """Return the weights of a block's linears, each by its share of the tokens, if it has one."""
    return sum(prod(linear.shape) * shares.get(linear.name, 1.0) for group in layout.groups for linear in group)


def _rounds(layout: BlockLayout, recipe: Recipe) -> int:
    """Return how often a block learns."""
    if (learning := recipe.reconstruct) is None:
        return 0
    return (len(layout.groups) if learning.between else 1) + learning.window - 1


def _learned(recipe: Recipe) -> float:
    """Return the tokens whose forwards take as long as what a block learns in one round."""
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
    """Return the share of tokens that reach the linears of experts, by their module path; of others there is none."""
    config = job.source.config.get_text_config(decoder=True)
    chosen = next((value for key in EXPERTS if isinstance(value := getattr(config, key, None), int)), None)
    numbers: dict[str, set[str]] = {}
    for name in job.arch.linears():
        if found := EXPERT.fullmatch(name):
            numbers.setdefault(found[1], set()).add(found[2])
    known = {path: 1.0 if chosen is None else min(1.0, chosen / len(found)) for path, found in numbers.items()}
    named = ((name, EXPERT.fullmatch(name)) for name in job.arch.linears())
    return {name: known[found[1]] for name, found in named if found}
