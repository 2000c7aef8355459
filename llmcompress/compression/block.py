"""One block: its layers are compressed one after the other and learn if asked for; its tensors are returned.

A layer is compressed once, for the model and for the disk: see `layer` and `parallel_layers`.
`CompressionState` holds everything about the current run that is not on the disk yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.fuse.awq import Balanced, balance
from llmcompress.compression.job import Job
from llmcompress.compression.journal import Entry
from llmcompress.compression.parallel_layers import solved
from llmcompress.compression.tied_layer import tied_layers
from llmcompress.distillation.blockwise.tune import Tune
from llmcompress.methods.layer import StepConfig
from llmcompress.reporting.report import LayerReport
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.runtime.side_by_side import workers_on
from llmcompress.weight.modules import LIKE, CompressedLinear, Layout, PackedWeight, TiedMatrix, put

DENSE = "dense"  # of a block that may still change: a weight as it was before its layer was compressed


@dataclass(eq=False)
class OpenBlock:
    """A block that may still change. `weights`: the dense matrices `[out, in]` that it learns from, by name; `packed`,
    `learned`: its weights and other parameters in the checkpoint, as they are now."""

    block: Block
    balanced: Balanced
    weights: dict[str, Tensor]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BlockResult:
    """The outcome of compressing a block. `closed`: for each block that nothing changes any more, every tensor that the
    checkpoint stores of it; `pending`: the tensors of the block that may still change, as they would be stored now, and
    the weights it learns from if they are not the model's; `entry`: the report of the block."""

    closed: tuple[dict[str, Tensor], ...]
    pending: dict[str, Tensor]
    entry: Entry


@dataclass(eq=False)
class CompressionState:
    """A job under way. `open`: the blocks that are not written yet, in order; `entries`: the finished blocks, those
    of an earlier run included; `common`: what tied blocks have in common, as far as it is compressed, by name."""

    job: Job
    device: torch.device
    tune: Tune | None
    held_out: int  # of the calibration sequences
    entries: list[Entry] = field(default_factory=list)
    ranks: Ranks = ALONE
    open: list[OpenBlock] = field(default_factory=list)
    common: dict[str, PackedWeight] = field(default_factory=dict)

    @property
    def rows(self) -> list[LayerReport]:
        """The layers of the report."""
        return [row for entry in self.entries for row in entry.rows]

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layouts of everything that was compressed, for the config."""
        return {name: layout for entry in self.entries for name, layout in entry.layouts.items()}

    @property
    def learned(self) -> dict[str, dict[str, Any]]:
        """The learning of every block, by path."""
        return {path: found for entry in self.entries for path, found in entry.learned.items()}

    @property
    def fused(self) -> tuple[str, ...]:
        """The notes of what was fused into the dense weights."""
        return tuple(note for entry in self.entries for note in entry.fused)

    @property
    def common_by_linear(self) -> dict[str, PackedWeight]:
        """The matrices that tied linears have in common with others, by linear, as far as they are compressed."""
        return {name: self.common[tied.name] for name, tied in self.job.ties.items() if tied.name in self.common}

    @cached_property
    def steps(self) -> dict[str, tuple[StepConfig, ...]]:
        """The steps of everything that is compressed, by name."""
        return self.job.steps | self.job.tables


def _balanced(run: CompressionState, block: Block) -> Balanced:
    """Scale the channels of the block, where the recipe asks for it."""
    job, fuse = run.job, run.job.recipe.fuse
    if fuse is None or not fuse.awq:
        return Balanced()
    with run.ranks.agree_on_errors():
        found = balance(block, job.source, job.arch, job.steps)
    run.ranks.compare({"channel scales, as other processors find,": found.notes})
    return found


def swap(block: Block, weights: Mapping[str, PackedWeight], common: Mapping[str, PackedWeight] | None = None) -> None:
    """Put compressed linears in the place of those at the module paths in `weights`. Biases stay.

    `common`: by linear, what it has in common with others.
    """
    for name in (name for name in weights if name in block.linears):
        inside = name.removeprefix(f"{block.path}.")
        bias = dict(block.module.get_submodule(inside).named_parameters()).get("bias")
        linear = CompressedLinear(*weights[name], bias)
        if common and name in common:
            linear.have_in_common(TiedMatrix(*common[name]))
        put(block.module, inside, linear)


def compress_block(run: CompressionState, block: Block) -> BlockResult:
    """Swap the block's linears for compressed ones, and let it learn where the run asks for it."""
    balanced = _balanced(run, block)  # gives the groups other moments
    tune, groups = run.tune, [group for group in block.groups if any(name in run.steps for name in group.names)]
    named = [name for group in groups for name in group.names if name in run.steps]
    here = OpenBlock(block, balanced, {} if tune is None else {name: block.weight(name) for name in named})
    run.open.append(here)
    unweighed = [block.path] if any(group.unweighed for group in block.groups) else []
    entry = Entry(fused=list(balanced.notes), unweighed=unweighed)
    together, workers = _together(run, groups)
    for number, at_once in enumerate(together):
        if number and tune is not None and tune.between and block.gather is not None:
            at_once = (block.gather(at_once[0].names),)
        weights, rows = solved(run.job, block, at_once, run.ranks, workers)
        tied, more = tied_layers(run.job, block, at_once, run.common)
        run.common |= {name: weight for name, weight in tied.items() if name not in block.linears}
        weights, rows = weights | tied, [*rows, *more]
        swap(block, weights, run.common_by_linear)
        here.packed |= weights
        entry.rows += rows
        last = number + 1 == len(together)
        if tune is not None and (last or tune.between) and block.wanted is not None:
            found = _learn(run, tune, block, last)
            left = entry.learned[block.path]["left"] if block.path in entry.learned else 1.0
            entry.learned[block.path] = found | {"left": left * _left(found)}
        trim_memory()
    stays = 1 if _stays_open(run, block) else 0
    closed, run.open = run.open[: len(run.open) - stays], run.open[len(run.open) - stays :]
    entry.layouts |= {name: weight.layout for each in (*closed, *run.open) for name, weight in each.packed.items()}
    return BlockResult(tuple(_tensors(run.job, each) for each in closed), _pending(run), entry)


def _together(run: CompressionState, groups: Sequence[InputGroup]) -> tuple[list[tuple[InputGroup, ...]], int]:
    """Return the groups that are compressed at once, and how many of their layers are side by side.

    Without learning between them, no group depends on what became of another. Those of small experts fill a GPU
    together; their factors take memory, so no more are together than it takes.
    """
    alone, between = run.ranks.count == 1, run.tune is not None and run.tune.between
    workers = workers_on(run.device) if alone else 1
    if not alone and not between:
        return [tuple(groups)], workers
    if workers == 1 or between:
        return [(group,) for group in groups], workers
    found: list[tuple[InputGroup, ...]] = []
    for group in groups:
        if found and sum(len(each.names) for each in found[-1]) + len(group.names) <= workers:
            found[-1] = (*found[-1], group)
        else:
            found.append((group,))
    return found, workers


def _stays_open(run: CompressionState, block: Block) -> bool:
    """True if a block whose layers are set learns again together with the next one."""
    return run.tune is not None and run.tune.window > 1 and block.index + 1 < len(run.job.arch.blocks)


def _pending(run: CompressionState) -> dict[str, Tensor]:
    """Return the `pending` of a `BlockResult`."""
    if not run.open:
        return {}
    here = run.open[-1]
    scaled = here.weights if here.balanced.notes else {}
    return _tensors(run.job, here) | {f"{name}.{DENSE}": weight for name, weight in scaled.items()}


def common_of(run: CompressionState, tensors: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
    """Return the matrices that tied blocks have in common among the stored `tensors` of a block."""
    names, layouts = {tied.name for tied in run.job.ties.values()}, run.layouts
    there = [name for name in names if f"{name}.weight" in tensors]
    return {name: PackedWeight(layouts[name], tensors[f"{name}.weight"].to(run.device)) for name in there}


@torch.no_grad()
def restore(run: CompressionState, block: Block, tensors: Mapping[str, Tensor], last: bool) -> None:
    """Restore the block from its stored `tensors`; the `last` one of an earlier run may be waiting for the next."""
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
        run.open.append(OpenBlock(block, Balanced(), weights, stored, learned))


def _learn(run: CompressionState, tune: Tune, block: Block, last: bool) -> dict[str, Any]:
    """Let the block learn, together with the one before it if that is open, once its `last` layers are set.

    Returns the errors before and after.
    """
    together = run.open if last else run.open[-1:]
    blocks = (block,) if len(together) == 1 or block.before is None else (block.before, block)
    weights = {name: weight for each in together for name, weight in each.weights.items()}
    tuned = tune.learn(blocks, weights, run.held_out)
    for each in together:
        inside = f"{each.block.path}."
        linears = {name: linear for name, linear in tuned.linears.items() if name.startswith(inside)}
        each.packed |= {name: PackedWeight.of(linear) for name, linear in linears.items()}
        theirs = {name: value for name, value in tuned.dense.items() if name.startswith(inside)}
        each.learned |= _stored(run.job, each.block, theirs)
    return tuned.found


def _left(found: Mapping[str, Any]) -> float:
    """Return the share of a block's error that learning once left."""
    return float(found["after"] / found["before"]) if found["before"] else 1.0


def _tensors(job: Job, done: OpenBlock) -> dict[str, Tensor]:
    """Return every tensor that the checkpoint stores of a block."""
    path = done.block.path
    payload: dict[str, Tensor] = {}
    for name, weight in done.packed.items():
        payload[f"{name}.weight"] = weight.payload
        if name == job.arch.embedding:
            payload[f"{name}.{LIKE}"] = torch.empty(0, dtype=job.source.read(f"{name}.weight").dtype)
    apart = {f"{name}.weight" for name in done.packed} | set(done.learned)
    inside = (n for n in job.source.tensors if n.startswith(f"{path}.") and n not in apart)
    stored = {name: job.source.read(name) for name in inside}
    return payload | done.learned | stored | done.balanced.tensors(done.block)


@torch.no_grad()
def _stored(job: Job, block: Block, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a block learned outside compressed linears, in the types that the dense model stores, and put it into
    the block."""
    found = {}
    for name, value in learned.items():
        if name in job.source.tensors:
            found[name] = value.to(job.source.read(name).dtype)
            block.model.get_parameter(name).copy_(found[name])
    return found
