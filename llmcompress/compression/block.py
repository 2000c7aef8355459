"""What becomes of one block: its layers compressed one after the other, learning if asked for, and its tensors.

`CompressionState` is the job under way: of all blocks, what is not on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibrate.walk import Block, InputGroup
from llmcompress.compression.fuse.awq import Balanced, balance
from llmcompress.compression.journal import Entry
from llmcompress.compression.plan import Job
from llmcompress.distill.blockwise.tune import Tune
from llmcompress.errors import NumericsError
from llmcompress.evaluate.report import LayerReport
from llmcompress.methods.engines.hessian import damped
from llmcompress.methods.layer import Layer, StepConfig, relative_error
from llmcompress.methods.moments import Moments
from llmcompress.methods.row_chunks import apply_in_runs
from llmcompress.runtime.memory import trim_memory
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import bits, dense, describe
from llmcompress.weight.modules import LIKE, CompressedLinear, Layout
from llmcompress.weight.nodes import Dense, Weight

DENSE = "dense"  # of a block that may still change: a weight as it was before its layer was compressed
TARGET_DAMPING = 0.1  # of the solve that aims at the dense model's outputs


@dataclass(eq=False)
class Open:
    """A block that may still change. `weights`: the dense matrices `[out, in]` that it learns from, by name; `linears`,
    `learned`: what the checkpoint will hold of it, as it is now."""

    block: Block
    balanced: Balanced
    weights: dict[str, Tensor]
    linears: dict[str, CompressedLinear] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class CompressionState:
    """A job under way. `open`: the blocks that are not written yet, in order; `entries`: of every block that was begun,
    those of an earlier run included."""

    job: Job
    device: torch.device
    tune: Tune | None
    held_out: int  # of the calibration sequences
    entries: list[Entry] = field(default_factory=list)
    open: list[Open] = field(default_factory=list)

    @property
    def rows(self) -> list[LayerReport]:
        """Of the report."""
        return [row for entry in self.entries for row in entry.rows]

    @property
    def layouts(self) -> dict[str, Layout]:
        """Of everything that was compressed, for the config."""
        return {name: layout for entry in self.entries for name, layout in entry.layouts.items()}

    @property
    def learned(self) -> dict[str, dict[str, Any]]:
        """How every block learned, by path."""
        return {path: found for entry in self.entries for path, found in entry.learned.items()}

    @property
    def fused(self) -> tuple[str, ...]:
        """What went into the dense weights."""
        return tuple(note for entry in self.entries for note in entry.fused)

    @cached_property
    def steps(self) -> dict[str, tuple[StepConfig, ...]]:
        """Of everything that is compressed."""
        return self.job.steps | self.job.tables


def _balanced(job: Job, block: Block) -> Balanced:
    """The block with its channels scaled, where the recipe asks for it."""
    fuse = job.recipe.fuse
    return balance(block, job.source, job.arch, job.steps) if fuse is not None and fuse.awq else Balanced()


def compress_block(run: CompressionState, block: Block) -> Iterator[dict[str, Tensor]]:
    """Swaps the block's linears for compressed ones; then, for each block that nothing changes any more, every tensor
    that the checkpoint stores of it. What there is to say goes into a new entry."""
    run.entries.append(Entry())
    tune, named = run.tune, [name for group in block.groups for name in group.names if name in run.steps]
    balanced = _balanced(run.job, block)
    run.entries[-1].fused += balanced.notes
    here = Open(block, balanced, {} if tune is None else {name: block.weight(name) for name in named})
    run.open.append(here)
    groups = [group for group in block.groups if any(name in run.steps for name in group.names)]
    for number, group in enumerate(groups):
        if number and tune is not None and tune.between and block.gather is not None:
            group = block.gather(group.names)
        here.linears |= block.swap(_compressed(run, block, group))
        last = number + 1 == len(groups)
        if tune is not None and (last or tune.between) and block.wanted is not None:
            _learn(run, tune, block, last)
        trim_memory()
    while len(run.open) > _stays_open(run, block):
        yield _tensors(run, run.open.pop(0))


def _stays_open(run: CompressionState, block: Block) -> bool:
    """Whether a block whose layers are set learns again together with the next one."""
    return run.tune is not None and run.tune.window > 1 and block.index + 1 < len(run.job.arch.blocks)


def pending_tensors(run: CompressionState) -> dict[str, Tensor]:
    """The tensors of the block that may still change, as they would be stored now, and the weights it learns from if
    they are not the model's; empty where there is none."""
    if not run.open:
        return {}
    here = run.open[-1]
    scaled = here.weights if here.balanced.notes else {}
    return _tensors(run, here) | {f"{name}.{DENSE}": weight for name, weight in scaled.items()}


@torch.no_grad()
def restore(run: CompressionState, block: Block, tensors: Mapping[str, Tensor], last: bool) -> None:
    """Makes the block what its stored `tensors` say; the `last` one of an earlier run may be waiting for the next."""
    layouts, tensors = run.layouts, {name: value.to(run.device) for name, value in tensors.items()}
    names = [name for name in block.linears if name in layouts and f"{name}.weight" in tensors]
    weights = {name: tensors.get(f"{name}.{DENSE}", block.weight(name)) for name in names}
    found = {name: decode(layouts[name].header, layouts[name].views(tensors[f"{name}.weight"])) for name in names}
    linears = block.swap(found)
    apart = {f"{name}.{leaf}" for name in names for leaf in ("weight", DENSE)}
    for name, value in block.module.named_parameters(prefix=block.path):
        if name in tensors and name not in apart:
            value.copy_(tensors[name])
    if last and _stays_open(run, block):
        learned = {name: value for name, value in tensors.items() if name not in apart}
        run.open.append(Open(block, Balanced(), weights, linears, learned))


def _learn(run: CompressionState, tune: Tune, block: Block, last: bool) -> None:
    """Lets the block learn; together with the one before it, if that is open, once its `last` layers are set."""
    together = run.open if last else run.open[-1:]
    blocks = (block,) if len(together) == 1 or block.before is None else (block.before, block)
    weights = {name: weight for each in together for name, weight in each.weights.items()}
    tuned = tune.learn(blocks, weights, run.held_out)
    for each in together:
        inside = f"{each.block.path}."
        each.linears |= {name: linear for name, linear in tuned.linears.items() if name.startswith(inside)}
        theirs = {name: value for name, value in tuned.dense.items() if name.startswith(inside)}
        each.learned |= _stored(run.job, each.block, theirs)
    known = run.entries[-1].learned
    known[block.path] = tuned.found | {"left": known.get(block.path, {"left": 1.0})["left"] * _left(tuned.found)}


def _left(found: Mapping[str, Any]) -> float:
    """The share of a block's error that learning once left."""
    return float(found["after"] / found["before"]) if found["before"] else 1.0


def _tensors(run: CompressionState, done: Open) -> dict[str, Tensor]:
    """Every tensor that the checkpoint stores of a block, and its layouts into the entry."""
    job, path = run.job, done.block.path
    payload: dict[str, Tensor] = {}
    for name, module in done.linears.items():
        run.entries[-1].layouts[name] = module.layout
        payload[f"{name}.weight"] = module.get_parameter("weight").detach()
        if name == job.arch.embedding:
            payload[f"{name}.{LIKE}"] = torch.empty(0, dtype=job.source.read(f"{name}.weight").dtype)
    apart = {f"{name}.weight" for name in done.linears} | set(done.learned)
    inside = (n for n in job.source.tensors if n.startswith(f"{path}.") and n not in apart)
    stored = {name: job.source.read(name) for name in inside}
    return payload | done.learned | stored | done.balanced.tensors(done.block)


def _compressed(run: CompressionState, block: Block, group: InputGroup) -> dict[str, Weight]:
    """What becomes of the linears of a group, by name."""
    done: dict[str, Weight] = {}
    for name in (name for name in group.names if name in run.steps):
        layer = _layer(run.job, name, group.names[0], block.weight(name), group.inputs)
        compressed = apply_in_runs(layer, run.steps[name])
        done[name] = compressed.expression()
        run.entries[-1].rows.append(_row(run.steps[name], layer, compressed, group.held_out))
    group.inputs.derived.clear()  # factors that only this group's linears could share
    return done


@torch.no_grad()
def _stored(job: Job, block: Block, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a block learned outside compressed linears, in the types that the dense model stores; the block goes on with
    that."""
    found = {}
    for name, value in learned.items():
        if name in job.source.tensors:
            found[name] = value.to(job.source.read(name).dtype)
            block.model.get_parameter(name).copy_(found[name])
    return found


def _layer(job: Job, name: str, group: str, weight: Tensor, inputs: Moments) -> Layer:
    """The layer as methods see it; layers that read the same input get the same seed."""
    target = weight
    if inputs.cross is not None and inputs.outer is not None:
        target = weight + job.recipe.asymmetric * (weight @ _to_dense_outputs(inputs, inputs.outer, inputs.cross))
    seed = f"{job.recipe.seed}/{group}"
    return Layer(name, target, Dense(target.to(torch.bfloat16)), inputs, seed)


def _to_dense_outputs(inputs: Moments, outer: Tensor, cross: Tensor) -> Tensor:
    """D `[in, in]` for which W + W D, on the inputs seen, comes closest to W's outputs on the dense model's inputs.

    (C - H) inverse(H) with C = X_dense^T X and H = X^T X (GPTAQ, arXiv 2504.02692); one for all layers that read X.
    """

    def compute() -> Tensor:
        hessian = damped(outer.double(), TARGET_DAMPING)
        return torch.linalg.solve(hessian, (cross - outer).double(), left=False).float()

    return inputs.memo("to_dense_outputs", compute)


def _row(steps: tuple[StepConfig, ...], layer: Layer, compressed: Layer, held_out: Moments | None) -> LayerReport:
    stored = compressed.expression()
    value = dense(stored)
    error = relative_error(layer.weight, value, layer.inputs)
    if not error < float("inf"):
        raise NumericsError(f"{layer.name}: the compressed weight holds NaN or Inf; choose other steps for it")
    size = (layer.weight.shape[0], layer.weight.shape[1])
    return LayerReport(
        name=layer.name,
        shape=size,
        steps=tuple(s.method for s in steps),
        bpw=bits(stored) / prod(size),
        error=error,
        error_heldout=None if held_out is None else relative_error(layer.weight, value, held_out),
        fallback="; ".join(compressed.notes) or None,
        stored=describe(stored),
    )
