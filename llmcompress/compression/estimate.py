"""Estimates of a run's peak memory and time, from shapes alone.

The terms of the memory are those of the largest moment of a block: its weights, the moments of what its linears read,
and the factors of the widest of them; they were fitted to measured peaks (`scripts/bench/estimates.py`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from math import prod

import torch

from llmcompress.compression.fuse.awq import EXPONENTS
from llmcompress.models.dense import DenseModel
from llmcompress.models.families import Architecture, BlockLayout
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime.precision import product_dtype

LIBRARIES = 560_000_000  # bytes that torch and transformers take before any work
FACTOR = 18.3  # bytes for each entry of H while it is factored: float64 twice, and what comes of it
AIM = 32.0  # likewise while a layer aims at the dense model's outputs: H, right-hand side, factor, solution
LAYER_BYTES = 8  # for each weight of the largest layer: its target and its approximation
COMPILER = 220_000_000  # bytes that the compiler of searches takes
SEARCHED = frozenset({"trellis", "exl3"})
LEARNING_BYTES = 16  # for each weight of a block that learns: gradient, two moments, and the best state
TABLE_BYTES = 16  # for each weight of a table while it is compressed: float32 twice, bfloat16, codes, and their sum
BATCH = 2048  # tokens in a forward
ACTIVATIONS = 6  # tensors as wide as the widest inputs that a forward of a batch holds
COLUMN_SECONDS = 4e-5  # for each column of a feedback loop, whatever the length of the column
FORWARD_SHARE = 2.0  # time of a calibration pass over the time of its linears: attention, norms and other work
EXPERT = re.compile(r"(.+)\.(\d+)\.(?:gate|up|down)_proj")
EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def peak_bytes(
    source: DenseModel,
    arch: Architecture,
    recipe: Recipe,
    tables: list[str],
    needs: Mapping[str, frozenset[str]],
    used: Collection[str],
) -> int:
    """Return the peak memory of a run in bytes: hidden states, and the largest of blocks, embeddings and tables.

    `needs`: the statistics that the methods of each compressed matrix read, by name; `used`: all these methods. Blocks
    are held one at a time, or several if they learn together.
    """
    calibration = recipe.calibration
    tokens = 0 if calibration is None else (calibration.samples + calibration.held_out) * calibration.length
    learning = 0 if recipe.reconstruct is None else recipe.reconstruct.window
    streams = 1 + max(learning, 1 if recipe.asymmetric else 0)
    blocks = max(_block_bytes(layout, recipe, needs, learning) for layout in arch.blocks)
    stored = [prod(header.shape) for header in source.tensors.values()]
    searched = any(method in SEARCHED for method in used)
    outside = max((prod(source.tensors[f"{name}.weight"].shape) for name in tables), default=0) * TABLE_BYTES
    return int(
        LIBRARIES + COMPILER * searched + 4 * tokens * width_of(arch) * streams + max(blocks, 8 * max(stored), outside)
    )


def width_of(arch: Architecture) -> int:
    """Return the width of the hidden states: the least that a linear reads."""
    return min(group[0].shape[1] for layout in arch.blocks for group in layout.groups)


def _block_bytes(layout: BlockLayout, recipe: Recipe, needs: Mapping[str, frozenset[str]], learning: int) -> int:
    linears = [linear for group in layout.groups for linear in group]
    weights, widest = sum(prod(linear.shape) for linear in linears), max(linear.shape[1] for linear in linears)
    largest = max(prod(linear.shape) for linear in linears)
    moments, solved = 0, 0
    for group in layout.groups:
        read = frozenset().union(*(needs.get(linear.name, frozenset()) for linear in group))
        width, held_out = group[0].shape[1], recipe.calibration is not None and recipe.calibration.held_out > 0
        if "outer" in read and recipe.calibration is not None:
            moments += 4 * width**2 * (1 + held_out + ("cross" in read))
            solved = max(solved, width)
    work = int((AIM if recipe.asymmetric else FACTOR) * solved**2) + LAYER_BYTES * largest
    forward = 4 * ACTIVATIONS * BATCH * widest if recipe.calibration is not None else 0
    held = weights * (4 * max(learning, 1) + LEARNING_BYTES * learning)
    return held + moments + max(work, forward)


def seconds(source: DenseModel, arch: Architecture, recipe: Recipe, steps: Mapping[str, int]) -> float:
    """Return the time of a run: two forward passes, one product X^T X for each input, the column loops, and the search
    for scales, at the measured speed of this machine. `steps`: how many each compressed linear has, by name."""
    calibration = recipe.calibration
    tokens = 0 if calibration is None else calibration.samples * calibration.length
    linears = arch.linears()
    shares = _shares(source, list(linears))
    forward = sum(
        tokens
        * shares.get(group[0].name, 1.0)
        * (4 * sum(prod(linear.shape) for linear in group) + group[0].shape[1] ** 2)
        for layout in arch.blocks
        for group in layout.groups
    )
    solve = sum(linears[name].shape[0] * linears[name].shape[1] ** 2 for name in steps)
    if recipe.fuse is not None and recipe.fuse.awq:
        solve += 2 * len(EXPONENTS) * solve
    columns = sum(linears[name].shape[1] * count for name, count in steps.items())
    dtype = product_dtype(recipe.compute, torch.device("cpu"))
    return FORWARD_SHARE * forward / _speed(dtype) + solve / _speed(torch.float32) + columns * COLUMN_SECONDS


def _shares(source: DenseModel, linears: Iterable[str]) -> dict[str, float]:
    """Return the share of tokens that reach the linears of experts, by their module path; of others there is none."""
    config = source.config.get_text_config(decoder=True)
    chosen = next((value for key in EXPERTS if isinstance(value := getattr(config, key, None), int)), None)
    numbers: dict[str, set[str]] = {}
    for name in linears:
        if found := EXPERT.fullmatch(name):
            numbers.setdefault(found[1], set()).add(found[2])
    known = {path: 1.0 if chosen is None else min(1.0, chosen / len(found)) for path, found in numbers.items()}
    return {name: known[found[1]] for name in linears if (found := EXPERT.fullmatch(name))}


def _speed(dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a product."""
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / (time.perf_counter() - started)
