"""Estimate of a run's peak memory, from shapes alone.

The peak is at the largest block: its weights, the moments of its linears' inputs, and the factors of the widest of
them. The terms were fitted to measured peaks (`research/estimates.py`). On a GPU all that is in the GPU's memory, and
the host holds one stored block that was read ahead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from llmcompress.calibration.blocks import TOKENS_PER_BATCH
from llmcompress.calibration.gradients import TOKENS, count_read
from llmcompress.calibration.head_rows import LARGE
from llmcompress.calibration.streaming import positions_at_once
from llmcompress.compression.job import Job
from llmcompress.data.calibration import held_out_count
from llmcompress.data.generate import ROWS
from llmcompress.models.dense.families import BlockLayout
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.reporting.report import GATE_TOKENS, GATE_WINDOW
from llmcompress.runtime.memory import total_memory

FLOAT32 = 4  # bytes
STORED = 2  # bytes of a number of most checkpoints
LIBRARIES = 560_000_000  # bytes that torch and transformers take before any work
FACTOR = 14.0  # bytes for each entry of H while it is factored
TURNED = 20.0  # likewise where H is rotated first, or the layer aims at the dense model's outputs
LAYER_BYTES = 8  # for each weight of the largest layer: its target and its approximation
COMPILER = 130_000_000  # bytes that the compiler of searches and of sums over tokens takes, and what these work in
SEARCHED = frozenset({"trellis", "exl3"})
LEARNING_BYTES = 16  # for each weight of a block that learns: gradient, two moments, and the best state
TABLE_BYTES = 10  # for each weight of a table while it is compressed: float32, its file, codes twice, and a run
GRAPH = 1.5  # of what a block's linears read and give, that its backward pass holds
GROWN = 2.4  # of the keys and values of a text that is written: each token makes them anew, one longer
ACTIVATIONS = 6  # tensors as wide as the widest inputs that a forward of a batch holds


def peak_bytes(
    job: Job, tables: list[str], needs: Mapping[str, frozenset[str]], used: Collection[str], processes: int = 1
) -> int:
    """Return the peak memory of a run in bytes: hidden states, and the largest of blocks, embeddings and tables.

    `tables`: names of compressed tables. `needs`: the statistics that the methods of each compressed matrix read, by
    name; `used`: all these methods. `processes`: how many share the sequences; the bytes are those of one.
    """
    arch, recipe, calibration = job.arch, job.recipe, job.recipe.calibration
    sequences = 0 if calibration is None else _largest_share(calibration, processes)
    tokens = 0 if calibration is None else sequences * calibration.length
    learning = 0 if recipe.reconstruct is None else recipe.reconstruct.window
    streams = 1 + max(learning, 1 if recipe.asymmetric else 0)
    factor = TURNED if recipe.asymmetric or job.inputs or "rotate" in used else FACTOR
    blocks = max(_block_bytes(layout, recipe, needs, learning, factor) for layout in arch.blocks)
    tensors = job.source.tensors
    stored = [prod(header.shape) for header in tensors.values()]
    compiled = calibration is not None or any(method in SEARCHED for method in used)
    outside = max((prod(tensors[f"{name}.weight"].shape) for name in tables), default=0) * TABLE_BYTES
    outside = max(outside, _importance_bytes(job, sequences))
    walked = 4 * tokens * width_of(job) * streams + max(blocks, 8 * max(stored), outside)
    gate = gate_bytes(job)
    walked += LIBRARIES + COMPILER * compiled
    return int(max(walked, LIBRARIES + _writing_bytes(job), gate if gate <= total_memory() else 0))


def _largest_share(text: Calibration, processes: int) -> int:
    """Return the sequences of the process with most of them: those to fit to and the held-out ones are shared apart."""
    held_out = held_out_count(text.held_out, text.samples)
    return sum(-(-part // processes) for part in (text.samples - held_out, held_out))


def _writing_bytes(job: Job) -> float:
    """Return the memory that the dense model takes while it writes the calibration text; 0 for any other text."""
    text = job.recipe.calibration
    if text is None or text.dataset != "self":
        return 0
    return FLOAT32 * job.source.parameters + GROWN * kept_bytes(job, min(ROWS, text.samples) * text.length)


def kept_bytes(job: Job, tokens: int) -> float:
    """Return the bytes of the keys and values of so many tokens, by the first linears of each block."""
    first = [[linear.shape[0] for linear in layout.groups[0]] for layout in job.arch.blocks]
    return FLOAT32 * tokens * sum(sum(rows) - max(rows) if len(rows) > 1 else 2 / 3 * rows[0] for rows in first)


def gate_tokens(recipe: Recipe) -> int:
    """Return the number of tokens that the gates of quality read at the end; 0 without gates."""
    text = recipe.calibration
    if text is None or not text.held_out or not recipe.gates.of_quality:
        return 0
    sequences = text.held_out if text.held_out >= 1 else max(1.0, text.held_out * text.samples)
    return int(min(GATE_TOKENS, sequences * text.length))


def gate_bytes(job: Job) -> int:
    """Return the peak memory of measuring the gates; 0 without any. A machine that has less leaves them unmeasured."""
    arch, tokens = job.arch, gate_tokens(job.recipe)
    table = job.source.tensors.get(f"{arch.embedding}.weight")
    if not tokens or table is None:
        return 0
    vocabulary, width = table.shape
    states = 2 * 4 * tokens * width_of(job)
    predicted = min(GATE_WINDOW, tokens, positions_at_once(vocabulary))
    head = vocabulary * width
    ends = head_bytes(head) + FLOAT32 * (head + 2 * vocabulary * predicted)  # the other may be decoded, in float32
    linears = [[prod(linear.shape) for group in layout.groups for linear in group] for layout in arch.blocks]
    block = max(4 * sum(sizes) + LAYER_BYTES * max(sizes) for sizes in linears)
    return LIBRARIES + states + max(ends, ends // 2 + block)


def _importance_bytes(job: Job, sequences: int) -> int:
    """Return the memory of the backward pass for the importance of tokens, beside the hidden states of the walk."""
    arch, text = job.arch, job.recipe.calibration
    if text is None:
        return 0
    count, length = count_read(job.recipe.token_weights, sequences, text.length)
    if count == 0:
        return 0
    tokens = min(max(TOKENS, length), count * length)
    states = 4 * tokens * width_of(job) * (len(arch.blocks) + 2)
    linears = [[linear for group in layout.groups for linear in group] for layout in arch.blocks]
    graph = max(4 * TOKENS_PER_BATCH * sum(GRAPH * sum(linear.shape) for linear in block) for block in linears)
    block = max(4 * sum(prod(linear.shape) for linear in block) for block in linears)
    vocabulary, width = job.source.tensors[f"{arch.embedding}.weight"].shape
    logits = FLOAT32 * vocabulary * min(length, positions_at_once(vocabulary))
    return int(states + max(block + graph, head_bytes(vocabulary * width) + 2 * logits))  # and probabilities


def head_bytes(weights: int) -> int:
    """Return the memory of the dense model's head."""
    return (STORED if weights >= LARGE else FLOAT32) * weights


def width_of(job: Job) -> int:
    """Return the width of the hidden states: where the config does not say, the smallest input of a linear."""
    width = getattr(job.source.config.get_text_config(decoder=True), "hidden_size", None)
    least = min(group[0].shape[1] for layout in job.arch.blocks for group in layout.groups)
    return width if isinstance(width, int) else least


def _block_bytes(
    layout: BlockLayout, recipe: Recipe, needs: Mapping[str, frozenset[str]], learning: int, factor: float
) -> int:
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
    work = int(factor * solved**2) + LAYER_BYTES * largest
    forward = 0
    if recipe.calibration is not None:  # weights lie there in the dtype of products too
        forward = 4 * ACTIVATIONS * TOKENS_PER_BATCH * widest + (2 * weights if recipe.compute != "float32" else 0)
    held = weights * (4 * max(learning, 1) + LEARNING_BYTES * learning)
    return held + moments + max(work, forward)
