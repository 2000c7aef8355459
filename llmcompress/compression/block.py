"""One block: its layers are compressed one after the other and learn if asked for; its tensors are returned.

A layer is compressed once, for the model and for the disk: see `layers`. `CompressionState` holds everything about the
current run that is not on the disk yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.awq import ScaledChannels, scale_channels
from llmcompress.compression.job import Job
from llmcompress.compression.layers import compress_layers, compress_tied_layers
from llmcompress.compression.run_files import BlockEntry
from llmcompress.distillation.reconstruct import BlockTuner
from llmcompress.reporting.report import LayerReport
from llmcompress.runtime.devices import workers_on
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.phases import phase
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.layout import Layout, PackedWeight
from llmcompress.weight.modules import LIKE, CompressedLinear, TiedMatrix, put

DENSE = "dense"  # of a block that may still change: a weight as it was before its layer was compressed


@dataclass(eq=False)
class OpenBlock:
    """A block that may still change.

    `weights`: the dense matrices `[out, in]` that it learns from, by name. `packed`, `learned`: its weights and other
    parameters in the checkpoint, as they are now.
    """

    block: Block
    scaled: ScaledChannels
    weights: dict[str, Tensor]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BlockResult:
    """The outcome of compressing a block.

    `closed`: for each block that will not change any more, every tensor that the checkpoint stores of it. `pending`:
    the tensors of the block that may still change, as they would be stored now, with the weights it learns from if they
    are not the model's.
    """

    closed: tuple[dict[str, Tensor], ...]
    pending: dict[str, Tensor]
    entry: BlockEntry


@dataclass(eq=False)
class CompressionState:
    """A job under way.

    `smoothed`: scales of the block that comes next, chosen for inputs that will be rounded. `entries`: the finished
    blocks, those of an earlier run included. `open`: blocks that are not written yet, in order.
    `common`: the common matrices of tied blocks that are compressed, by name.
    """

    job: Job
    device: torch.device
    tune: BlockTuner | None
    held_out: int  # of the calibration sequences
    entries: list[BlockEntry] = field(default_factory=list)
    ranks: Ranks = ALONE
    open: list[OpenBlock] = field(default_factory=list)
    common: dict[str, PackedWeight] = field(default_factory=dict)
    smoothed: ScaledChannels | None = None

    @property
    def rows(self) -> list[LayerReport]:
        """The layers of the report."""
        return [row for entry in self.entries for row in entry.rows]

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layouts of everything that was compressed, for the config."""
        return {name: layout for entry in self.entries for name, layout in entry.layouts.items()}

    @property
    def common_by_linear(self) -> dict[str, PackedWeight]:
        """The common matrices that are compressed, by linear."""
        return {name: self.common[tie.name] for name, tie in self.job.ties.items() if tie.name in self.common}


def swap(block: Block, weights: Mapping[str, PackedWeight], common: Mapping[str, PackedWeight] | None = None) -> None:
    """Put compressed linears in the place of those at the module paths in `weights`. Biases stay.

    `common`: common matrices by linear.
    """
    for name in (name for name in weights if name in block.linears):
        inside = name.removeprefix(f"{block.path}.")
        bias = dict(block.module.get_submodule(inside).named_parameters()).get("bias")
        linear = CompressedLinear(*weights[name], bias)
        if common and name in common:
            linear.have_in_common(TiedMatrix(*common[name]))
        put(block.module, inside, linear)


def compress_block(run: CompressionState, block: Block) -> BlockResult:
    """Swap the block's linears for compressed ones, and let it learn if the run asks for it."""
    job, tune = run.job, run.tune
    scaled, run.smoothed = run.smoothed or _scale_channels(run, block), None  # gives the groups other moments
    groups = [group for group in block.groups if any(name in job.all_steps for name in group.names)]
    names = [name for group in groups for name in group.names if name in job.all_steps]
    here = OpenBlock(block, scaled, {} if tune is None else {name: block.weight(name) for name in names})
    run.open.append(here)
    unweighed = [block.path] if any(group.unweighed for group in block.groups) else []
    entry = BlockEntry(fused=list(scaled.notes), unweighed=unweighed, kv_scales=block.kv_scales)
    batches, workers = _batch_groups(run, groups)
    for number, batch in enumerate(batches):
        if number and tune is not None and tune.recipe.between and block.gather is not None:
            batch = (block.gather(batch[0].names),)
        weights, rows = compress_layers(job, block, batch, run.ranks, workers)
        tied_weights, tied_rows = compress_tied_layers(job, block, batch, run.common)
        run.common |= {name: weight for name, weight in tied_weights.items() if name not in block.linears}
        weights |= tied_weights
        swap(block, weights, run.common_by_linear)
        here.packed |= weights
        entry.rows += [*rows, *tied_rows]
        last = number + 1 == len(batches)
        if tune is not None and (last or tune.recipe.between) and block.wanted is not None:
            errors = _learn(run, tune, block, last)
            left = entry.learned[block.path]["left"] if block.path in entry.learned else 1.0
            left *= float(errors["after"] / errors["before"]) if errors["before"] else 1.0
            entry.learned[block.path] = errors | {"left": left}
        trim_memory()
    stays = 1 if _stays_open(run, block) else 0
    closed, run.open = run.open[: len(run.open) - stays], run.open[len(run.open) - stays :]
    entry.layouts |= {name: weight.layout for each in (*closed, *run.open) for name, weight in each.packed.items()}
    return BlockResult(tuple(_stored_tensors(job, each) for each in closed), _pending_tensors(run), entry)


def smooth_inputs(run: CompressionState, block: Block) -> None:
    """Scale the channels of a block before its moments are gathered: rounding the inputs depends on the scales."""
    run.smoothed = _scale_channels(run, block)


def _scale_channels(run: CompressionState, block: Block) -> ScaledChannels:
    """Scale the channels of the block if the recipe asks for it."""
    job, fuse = run.job, run.job.recipe.fuse
    if fuse is None or not fuse.awq:
        return ScaledChannels()
    with run.ranks.agree_on_errors():
        scaled = scale_channels(block, job.source, job.arch, job.steps, job.inputs)
    run.ranks.compare({"channel scales, as other processors find,": scaled.notes})
    return scaled


def _batch_groups(run: CompressionState, groups: Sequence[InputGroup]) -> tuple[list[tuple[InputGroup, ...]], int]:
    """Return the groups that are compressed at once, and how many of their layers run side by side.

    Without learning between them, no group depends on another. Those of small experts fill a GPU together; their
    factors take memory, so no more are together than it takes.
    """
    alone, between = run.ranks.count == 1, run.tune is not None and run.tune.recipe.between
    workers = workers_on(run.device) if alone else 1
    if not alone and not between:
        return [tuple(groups)] if groups else [], workers
    if workers == 1 or between:
        return [(group,) for group in groups], workers
    batches: list[tuple[InputGroup, ...]] = []
    for group in groups:
        if batches and sum(len(each.names) for each in batches[-1]) + len(group.names) <= workers:
            batches[-1] = (*batches[-1], group)
        else:
            batches.append((group,))
    return batches, workers


def _learn(run: CompressionState, tune: BlockTuner, block: Block, last: bool) -> dict[str, Any]:
    """Let the block learn; once its `last` layers are set, together with the block before if that is open.

    Returns the errors before and after.
    """
    together = run.open if last else run.open[-1:]
    blocks = (block,) if len(together) == 1 or block.before is None else (block.before, block)
    weights = {name: weight for each in together for name, weight in each.weights.items()}
    with phase("learn"):
        tuned = tune.learn(blocks, weights, run.held_out)
    for each in together:
        inside = f"{each.block.path}."
        linears = {name: linear for name, linear in tuned.linears.items() if name.startswith(inside)}
        each.packed |= {name: linear.packed_weight() for name, linear in linears.items()}
        dense = {name: value for name, value in tuned.dense.items() if name.startswith(inside)}
        each.learned |= _store_learned(run.job, each.block, dense)
    return tuned.report


@torch.no_grad()
def _store_learned(job: Job, block: Block, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put what a block learned outside of compressed linears into it, in the stored types, and return that."""
    stored = {}
    for name, value in learned.items():
        if name in job.source.tensors:
            stored[name] = value.to(job.source.read(name).dtype)
            block.model.get_parameter(name).copy_(stored[name])
    return stored


def _stays_open(run: CompressionState, block: Block) -> bool:
    """True if a block whose layers are set learns again together with the next one."""
    return run.tune is not None and run.tune.recipe.window > 1 and block.index + 1 < len(run.job.arch.blocks)


def _pending_tensors(run: CompressionState) -> dict[str, Tensor]:
    """Return the `pending` of a `BlockResult`."""
    if not run.open:
        return {}
    here = run.open[-1]
    scaled = here.weights if here.scaled.notes else {}
    return _stored_tensors(run.job, here) | {f"{name}.{DENSE}": weight for name, weight in scaled.items()}


def _stored_tensors(job: Job, done: OpenBlock) -> dict[str, Tensor]:
    """Return every tensor that the checkpoint stores of a block."""
    payload: dict[str, Tensor] = {}
    for name, weight in done.packed.items():
        payload[f"{name}.weight"] = weight.payload
        if name == job.arch.embedding:
            payload[f"{name}.{LIKE}"] = torch.empty(0, dtype=job.source.read(f"{name}.weight").dtype)
    apart = {f"{name}.weight" for name in done.packed} | set(done.learned)
    inside = (n for n in job.source.tensors if n.startswith(f"{done.block.path}.") and n not in apart)
    stored = {name: job.source.read(name) for name in inside}
    return payload | done.learned | stored | done.scaled.tensors(done.block)


def stored_common_matrices(run: CompressionState, tensors: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
    """Return the common matrices of tied blocks among the stored `tensors` of a block, by name."""
    names, layouts = {tie.name for tie in run.job.ties.values()}, run.layouts
    return {
        name: PackedWeight(layouts[name], tensors[f"{name}.weight"].to(run.device))
        for name in names
        if f"{name}.weight" in tensors
    }


@torch.no_grad()
def restore(run: CompressionState, block: Block, tensors: Mapping[str, Tensor], last: bool) -> None:
    """Restore a block from its stored `tensors`; the `last` one of an earlier run may learn again with the next."""
    layouts, tensors = run.layouts, {name: value.to(run.device) for name, value in tensors.items()}
    names = [name for name in block.linears if name in layouts and f"{name}.weight" in tensors]
    weights = {name: tensors.get(f"{name}.{DENSE}", block.weight(name)) for name in names}
    stored = {name: PackedWeight(layouts[name], tensors[f"{name}.weight"]) for name in names}
    swap(block, stored, run.common_by_linear)
    apart = {f"{name}.{leaf}" for name in names for leaf in ("weight", DENSE)}
    for name, value in block.module.named_parameters(prefix=block.path):
        if name in tensors and name not in apart:
            value.copy_(tensors[name])
    if last and _stays_open(run, block):
        learned = {name: value for name, value in tensors.items() if name not in apart}
        run.open.append(OpenBlock(block, ScaledChannels(), weights, stored, learned))
