"""The layers of a block: dense weight -> `Layer` -> methods -> packed weight, and the row of the report.

Processes share the layers, and every process gets all results. A work item is what a process compresses in one piece: a
layer, or a run of rows of a long one. Statistics are the same in every process, so weights are bit for bit those of one
process. Items go to processes by their estimated time, the longest first, each to where it would be done earliest;
layers that read the same input share a factor of its second moments, so they are cheaper together.

A linear of tied blocks is a common matrix, compressed where the first of its blocks is, and a term of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import SEARCHED
from llmcompress.compression.ties import CommonMatrix
from llmcompress.errors import NumericsError
from llmcompress.methods.layer import MANY, Layer, apply, base_and_term, relative_error, sampled_rows
from llmcompress.methods.moments import Moments
from llmcompress.methods.row_chunks import Outcome, apply_in_runs, apply_to_run, decode_in_runs, join_runs, runs
from llmcompress.methods.solvers.hessian import inverse_factor, outer_of
from llmcompress.reporting.report import LayerReport
from llmcompress.runtime.devices import side_by_side
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.phases import phase
from llmcompress.runtime.precision import is_finite
from llmcompress.runtime.progress import count_each
from llmcompress.runtime.ranks import Ranks
from llmcompress.weight.algebra import add_to_base
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import bits, dense, describe
from llmcompress.weight.layout import PackedWeight, pack_weight
from llmcompress.weight.nodes import Dense, Weight, Zero
from llmcompress.weight.rows import has_rows
from llmcompress.weight.rows import rows as decode_rows

TARGET_DAMPING = 0.1  # of the solve that aims at the dense model's outputs
# Seconds of one core; only their proportions count here.
FEEDBACK, FEEDBACK_WIDTH = 1.4e-7, 2e-11  # for each weight, and each weight and column: feedback and errors
SEARCH = 5e-7  # for each weight, of a trellis search
FACTOR, AIM = 6e-11, 3e-11  # for each cube of a width: a factor of H; the target at the dense model's outputs

PackedLayer = tuple[PackedWeight, LayerReport]


@dataclass(frozen=True)
class WorkItem:
    """Rows of a linear that are compressed in one piece. `group`: the number of its input group."""

    name: str
    group: int
    rows: slice
    seconds: float  # as estimated, without the factor that its group shares


def compress_layers(
    job: Job, block: Block, groups: Sequence[InputGroup], ranks: Ranks, workers: int = 1
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    """Compress the linears of input groups that have steps and are not tied, `workers` at once.

    Returns their packed weights by name, and their rows of the report in the same order.
    """
    items = _work_items(job, block, groups)
    owners = assign_to_ranks(items, [_factor_seconds(group) for group in groups], ranks.count)
    homes: dict[str, list[int]] = {}
    for item, owner in zip(items, owners, strict=True):
        homes.setdefault(item.name, []).append(owner)
    scattered = [name for name, places in homes.items() if len(set(places)) > 1]
    own = [item for item, owner in zip(items, owners, strict=True) if owner == ranks.rank]
    with ranks.agree_on_errors():
        done, pieces = _compress_items(job, block, groups, own, scattered, workers)
    if scattered:
        everything = {place: piece for each in ranks.gather(pieces) for place, piece in each.items()}
        with ranks.agree_on_errors():
            for name in (name for name in scattered if homes[name][0] == ranks.rank):
                parts = [everything[item.name, item.rows.start] for item in items if item.name == name]
                group = next(group for group in groups if name in group.names)
                done[name] = _pack_layer(job, layer_of(job, block, name, group), parts, group)
    for group in groups:
        group.inputs.derived.clear()  # factors that only its linears could share
    results = {name: result for each in ranks.gather(done) for name, result in each.items()}
    return {name: results[name][0] for name in homes}, [results[name][1] for name in homes]


def _compress_items(
    job: Job,
    block: Block,
    groups: Sequence[InputGroup],
    items: Sequence[WorkItem],
    scattered: Sequence[str],
    workers: int,
) -> tuple[dict[str, PackedLayer], dict[tuple[str, int], Outcome]]:
    """Compress the items of a process.

    Returns its whole layers by name, and runs of the `scattered` layers by name and first row.
    """
    done: dict[str, PackedLayer] = {}
    pieces: dict[tuple[str, int], Outcome] = {}
    names = list(dict.fromkeys((item.group, item.name) for item in items))

    def compress_rows(name: str, group: InputGroup) -> tuple[Layer, dict[int, Outcome]]:
        layer, steps, parts = layer_of(job, block, name, group), job.all_steps[name], dict[int, Outcome]()
        with phase("methods"):
            for item in (item for item in items if item.name == name):
                parts[item.rows.start] = apply_to_run(layer, steps, item.rows)
                if len(layer.weight) >= MANY:
                    trim_memory()  # what a run has freed lies between what the runs keep
        return layer, parts

    tasks = [partial(compress_rows, name, groups[number]) for number, name in names]
    outcomes = side_by_side(tasks, workers, next(block.module.parameters()).device)
    for place, (number, name) in enumerate(count_each(names, "layer"), 1):
        group, (layer, parts) = groups[number], next(outcomes)
        if name in scattered:
            pieces |= {(name, start): part for start, part in parts.items()}
        else:
            done[name] = _pack_layer(job, layer, list(parts.values()), group)
        del layer, parts  # before the next one is made
        last = place == len(names) or names[place][0] != number
        if last and not set(scattered).intersection(group.names):
            group.inputs.derived.clear()
    return done, pieces


def assign_to_ranks(items: Sequence[WorkItem], factors: Sequence[float], count: int) -> list[int]:
    """Return the process of each item.

    `factors`: seconds that the first item of each group takes beside its own, in each process that has one.
    """
    owners = [0] * len(items)
    loads, groups = [0.0] * count, [set[int]() for _ in range(count)]

    def load_with(rank: int, item: WorkItem) -> float:
        return loads[rank] + item.seconds + (0.0 if item.group in groups[rank] else factors[item.group])

    for number in sorted(range(len(items)), key=lambda number: (-items[number].seconds, number)):
        item = items[number]
        owners[number] = best = min(range(count), key=lambda rank: (load_with(rank, item), rank))
        loads[best] = load_with(best, item)
        groups[best].add(item.group)
    return owners


def _work_items(job: Job, block: Block, groups: Sequence[InputGroup]) -> list[WorkItem]:
    items, steps = [], job.all_steps
    for number, group in enumerate(groups):
        for name in (name for name in group.names if name in steps and name not in job.ties):
            rows, width = block.linears[name].shape
            each = FEEDBACK + FEEDBACK_WIDTH * width + SEARCH * sum(s.method in SEARCHED for s in steps[name])
            for run in runs(rows, steps[name]):
                items.append(WorkItem(name, number, run, (run.stop - run.start) * width * each))
    return items


def _factor_seconds(group: InputGroup) -> float:
    outer, cross = group.inputs.outer, group.inputs.cross
    if outer is None:
        return 0.0
    return float(len(outer) ** 3 * (FACTOR + (0.0 if cross is None else AIM)))


def layer_of(job: Job, block: Block, name: str, group: InputGroup) -> Layer:
    """Return a linear of the block as methods see it; linears that read the same input get the same seed."""
    weight, inputs = block.weight(name), group.inputs
    target = weight
    if inputs.cross is not None:
        try:
            change = to_dense_outputs(weight, inputs, inputs.cross, len(group.names))
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        # of rounded inputs, the cross moments have the share already
        target = weight + (job.recipe.asymmetric if group.format is None else 1.0) * change
    seed = f"{job.recipe.seed}/{group.names[0]}"
    return Layer(name, target, Dense(target), inputs, seed, rows=group.rows.get(name))


def to_dense_outputs(weight: Tensor, inputs: Moments, cross: Tensor, readers: int = 1) -> Tensor:
    """Return W D `[out, in]`: W + W D, on the inputs seen, comes closest to W's outputs on the dense model's inputs.

    D = (C - H) inverse(H) with C = X_dense^T X, `cross`, and H = X^T X (GPTAQ, arXiv 2504.02692). `readers`: number of
    layers that read X; several share D.
    """

    @phase("factor")
    def solve(left: Tensor | None) -> Tensor:
        gap = (cross - outer_of(inputs)).div_(max(inputs.tokens, 1e-30))
        gap = gap if left is None else left @ gap
        # a factor that is not kept: methods mostly work in another basis, and it is as large as H
        upper, _ = inverse_factor(replace(inputs, derived={}), TARGET_DAMPING)  # inverse(H) = U^T U
        return gap @ upper.T @ upper

    if readers == 1 and len(weight) < weight.shape[1]:
        return solve(weight)
    return weight @ inputs.memo("to_dense_outputs", lambda: solve(None))


def _pack_layer(job: Job, layer: Layer, parts: Sequence[Outcome], group: InputGroup) -> PackedLayer:
    """Return the packed weight of a layer, given its runs, and its row of the report.

    The errors of a large matrix are those of some rows, read from what was packed: a whole decoded token table may be
    most of a run's memory. Raises NumericsError for NaN or Inf in it.
    """
    stored, notes = join_runs(parts)
    with phase("pack"):
        packed = pack_weight(stored, group.format)
    header, chosen = packed.layout.header, _measured_rows(job, layer)
    with phase("report"):
        if isinstance(chosen, Tensor) and has_rows(header):
            _check_finite(layer.name, decode_in_runs(parts))
            value = dense(decode_rows(header, packed.views(), chosen.to(packed.payload.device)))
        else:
            value = dense(stored)
            _check_finite(layer.name, [value])
            value = value[chosen]
        text = describe_rounded(stored, group.format)
        return packed, _report_row(job, layer, (layer.weight[chosen], value), bits(stored), text, notes, group)


def _measured_rows(job: Job, layer: Layer) -> Tensor | slice:
    """Return the rows that a layer's errors are measured on: all, or some of a large matrix."""
    if job.recipe.exact_errors or len(layer.weight) < MANY:
        return slice(None)
    return sampled_rows(len(layer.weight)).to(layer.weight.device)


def _check_finite(name: str, values: Iterable[Tensor]) -> None:
    """Raise NumericsError for NaN or Inf in what comes of a layer's compressed weight, given in parts."""
    if not all(map(is_finite, values)):
        raise NumericsError(f"{name}: the compressed weight holds NaN or Inf; choose other steps for it")


def describe_rounded(stored: Weight, inputs: object | None) -> str:
    """Return in words what a layer stores, and what its inputs are rounded to."""
    return describe(stored) if inputs is None else f"{describe(stored)}, {inputs}"


def _report_row(
    job: Job,
    layer: Layer,
    measured: tuple[Tensor, Tensor],
    count: int,
    stored: str,
    notes: tuple[str, ...],
    group: InputGroup,
) -> LayerReport:
    """Return the row of a layer in `count` bits, described as `stored`.

    `measured`: rows of its weight, and what they became. Raises NumericsError for an error beyond all numbers.
    """
    error = relative_error(*measured, layer.inputs)
    _check_finite(layer.name, [torch.tensor(error, dtype=torch.float64)])
    size = (layer.weight.shape[0], layer.weight.shape[1])
    return LayerReport(
        name=layer.name,
        shape=size,
        steps=tuple(s.method for s in job.all_steps[layer.name]),
        bpw=count / prod(size),
        error=error,
        error_heldout=None if group.held_out is None else relative_error(*measured, group.held_out),
        fallback="; ".join(notes) or None,
        stored=stored,
        starved=group.starved,
    )


def compress_tied_layers(
    job: Job, block: Block, groups: Sequence[InputGroup], common: Mapping[str, PackedWeight]
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    """Compress the linears of input groups that share matrices with others, given the `common` ones so far.

    Returns their own terms and the common matrices that begin here, by name, and the rows of the report.
    """
    weights: dict[str, PackedWeight] = {}
    reports = []
    for group in groups:
        for name in (name for name in group.names if name in job.ties):
            tie, layer = job.ties[name], layer_of(job, block, name, group)
            notes: tuple[str, ...] = ()
            if tie.is_first(name):
                start = _mean_weight(job, tie).to(layer.weight.device)
                base, notes = apply_in_runs(replace(layer, name=tie.name, weight=start), tie.steps)
                weights[tie.name] = pack_weight(base)
            else:
                base = decode(common[tie.name].layout.header, common[tie.name].views())
            own = _own_term(tie, layer, dense(base))
            weights[name] = pack_weight(own)
            whole = add_to_base(base, own)
            stored = whole if tie.is_first(name) else own  # the common matrix counts in the first of its linears
            text = tie.description(name, stored)
            value, chosen = dense(whole), _measured_rows(job, layer)
            _check_finite(name, [value])
            measured = layer.weight[chosen], value[chosen]
            reports.append(_report_row(job, layer, measured, bits(stored), text, notes, group))
        group.inputs.derived.clear()
    return weights, reports


def _mean_weight(job: Job, tie: CommonMatrix) -> Tensor:
    """Return the common matrix before it is compressed, float32 `[out, in]`: the mean of its starting linears."""
    linears, total = job.arch.linears(), torch.zeros(tie.shape, dtype=torch.float32)
    for name in tie.start:
        weight = job.source.read(f"{name}.weight").float()
        total += weight.T if linears[name].transposed else weight
    return total / len(tie.start)


def _own_term(tie: CommonMatrix, layer: Layer, base: Tensor) -> Weight:
    """Return what a linear adds to the common matrix `base [out, in]`: a low-rank term, or nothing."""
    if tie.term is None:
        return Zero(tie.shape)
    lost = layer.weight - base
    done = apply(replace(layer, weight=lost, approx=Dense(torch.zeros_like(lost, dtype=torch.bfloat16))), [tie.term])
    return base_and_term(done.approx)[1] or Zero(tie.shape)
