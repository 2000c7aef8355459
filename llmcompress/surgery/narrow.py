"""Narrower blocks: the neurons and heads that a layer needs least go, and its other weights make up for them.

Blocks are narrowed in their order, each on the outputs of the narrower blocks before it. The result is a plain dense
checkpoint of the same architecture, with fewer `intermediate_size` or heads in its config. Where every block has a
width of its own, for which configs have no place, it is one that llmcompress helps transformers to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from llmcompress.calibration.walk import Block, Progress
from llmcompress.errors import NumericsError
from llmcompress.methods.solvers.hessian import add_damping, second_moment
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import open_source
from llmcompress.models.files import file_names
from llmcompress.models.files.output import check_writable
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import fast_float32
from llmcompress.surgery.edited_model import NewTensor, writing_model
from llmcompress.surgery.judged_walk import JudgedWalk, judged_calibration, read_tokens
from llmcompress.surgery.unit_choice import DAMPING, UnitScore, choose_units
from llmcompress.surgery.units import Narrowing, check_unequal_widths, neuron_step, plan_narrowing, plan_unequal_widths
from llmcompress.surgery.width_prices import measure_widths, widths_to_try

SAMPLES, HELD_OUT = 36, 4  # of text: 16,384 tokens to choose by, 2048 to judge on


@dataclass(frozen=True)
class PartFate(JsonRecord):
    """Units of one kind in a block. `kept`: the numbers of those that stay; `error`: of the outputs of the layer that
    reads them, as a share of their energy, once the others' absence is made up for."""

    part: str
    kept: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class NarrowedBlock:
    """One block. `damage`: see `Visit.damage`."""

    block: int
    damage: float
    parts: tuple[PartFate, ...]


@dataclass(frozen=True)
class NarrowReport(JsonRecord):
    """The narrower model. `before` and `after`: units of each kind in a block, on average where `per_block`; `damage`:
    then the KL in nats per token that blocks narrowed one by one add up to, else None; `output` is None where nothing
    was written; bytes count the weights."""

    model: str
    output: str | None
    before: dict[str, int]
    after: dict[str, float]
    by: str
    per_block: bool
    damage: float | None
    bytes_before: int
    bytes_after: int
    calibration: dict[str, Any]
    blocks: tuple[NarrowedBlock, ...]
    warnings: tuple[str, ...]


@fast_float32()
def narrow(
    model: str | Path,
    output: str | Path | None = None,
    *,
    neurons: float | None = None,
    kv_heads: int | None = None,
    per_block: bool = False,
    by: str = "energy",
    text: str = "stdlib",
    samples: int = SAMPLES,
    seed: int = 0,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> NarrowReport:
    """Write a dense model with fewer neurons or heads in every block, one block at a time; stock transformers loads it.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        output: a new or empty folder; None to look at the plan and write nothing.
        neurons: neurons of each feed-forward layer that stay, or their share below 1; None for all.
        kv_heads: key-value heads that stay in each block, each with the query heads that read it; None for all.
        per_block: True to give each block units as predictions need them there, in the bytes that `neurons` and
            `kv_heads` make everywhere. Reads the text once more, and llmcompress has to be installed where the result
            is loaded.
        by: `energy`, `subset` or `random`; see `surgery/unit_choice.py`.
        text: the text to read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens to read, a ninth of them to judge on.
        seed: random seed of `by="random"`.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.
        progress: receives (blocks walked, blocks, tokens per second).

    Returns:
        The units that stay, the predicted damage to each block, and the bytes before and after.

    Raises:
        RecipeError: for numbers of units that cannot stay.
        InputError: for a model whose parts cannot be told apart or is damaged, and for text that cannot serve.
        DiskError: for an output that cannot be written; then nothing is left behind.
    """
    place, score = device_of(device), UnitScore(by, seed)
    if output is not None:
        check_writable(Path(output), 0)
    source = open_source(locate(model, revision, trust_remote_code))
    arch = architecture(source.config, source.skeleton())
    plan = plan_narrowing(source, arch, neurons, kv_heads)
    if per_block:
        check_unequal_widths(arch, plan)
    tokens = read_tokens(source, judged_calibration(source, text, samples, SAMPLES // HELD_OUT))
    job = NarrowJob(JudgedWalk(source, arch, tokens, place, progress), plan, score)
    if per_block:
        job = job.with_unequal_widths()
    if output is None:
        return job.report(None, [block for _, block in job.narrow_blocks()])
    return job.write(Path(output), trust_remote_code)


@dataclass(frozen=True, eq=False)
class NarrowJob:
    """A model to narrow. `score`: of the units that stay; `damage`: see `NarrowReport`."""

    judged: JudgedWalk
    plan: Narrowing
    score: UnitScore
    damage: float | None = None

    def with_unequal_widths(self) -> NarrowJob:
        """Return the job in which each block has a width of its own, with at most the weights that this one leaves."""
        plan, arch = self.plan, self.judged.arch
        equal = {cut.part: cut.keep for cut in plan.cuts[0]}
        widths = {
            part: widths_to_try(total, equal[part], neuron_step(total) if part == "neurons" else 1)
            for part, total in plan.before.items()
        }
        chosen, damage = measure_widths(self.judged, plan.cuts, widths, self.score).choose_widths(equal)
        return replace(self, plan=plan_unequal_widths(arch, plan, chosen), damage=damage)

    def narrow_blocks(self) -> Iterator[tuple[dict[str, NewTensor], NarrowedBlock]]:
        """Yield the narrower tensors of each block, and its fate, in order."""
        needs = {cut.consumer.name: frozenset({"outer"}) for cuts in self.plan.cuts for cut in cuts}
        for visit in self.judged.visits(needs):
            block, before = visit.block, visit.outputs()
            new, fates = self._narrow_block(block)
            damage = visit.damage(before)
            if not isfinite(damage):
                raise NumericsError(f"{block.path}: its outputs became NaN or Inf; use an undamaged checkpoint")
            yield new, NarrowedBlock(block.index, damage, fates)

    @torch.no_grad()
    def _narrow_block(self, block: Block) -> tuple[dict[str, NewTensor], tuple[PartFate, ...]]:
        """Choose the units of a loaded block, with which the walk goes on; return its new tensors and their fate.

        The block keeps its shapes: the columns that read the other units become zero, which gives the same outputs.
        """
        new: dict[str, NewTensor] = {}
        fates = []
        for number, cut in enumerate(self.plan.cuts[block.index]):
            name = cut.consumer.name
            if number and block.gather is not None:
                group = block.gather((name,))  # the cut before has changed its inputs
            else:
                group = next(group for group in block.groups if name in group.names)
            hessian = add_damping(second_moment(group.inputs), DAMPING)
            subset = choose_units(block.weight(name), hessian, cut.keep, cut.size, self.score)
            parameter = block.module.get_submodule(name.removeprefix(f"{block.path}.")).get_parameter("weight")
            parameter.copy_(subset.weight.T if cut.consumer.transposed else subset.weight)
            new |= cut.new_tensors(self.judged.source, subset.numbers, subset.weight)
            fates.append(PartFate(cut.part, subset.numbers, subset.error))
        return new, tuple(fates)

    def report(self, output: str | None, blocks: list[NarrowedBlock]) -> NarrowReport:
        """Return the report on all blocks; `output`: None where nothing is written."""
        source, plan, tokens = self.judged.source, self.plan, self.judged.tokens
        return NarrowReport(
            model=source.public_name,
            output=output,
            before={str(part): count for part, count in plan.before.items()},
            after={str(part): count for part, count in plan.after.items()},
            by=self.score.by,
            per_block=self.damage is not None,
            damage=self.damage,
            bytes_before=source.bytes,
            bytes_after=plan.change.model({}).bytes,
            calibration=tokens.report(),
            blocks=tuple(blocks),
            warnings=(*source.notes, *tokens.notes),
        )

    def write(self, output: Path, trust_remote_code: bool) -> NarrowReport:
        """Write each block to the folder `output` once it is narrowed, and return the report."""
        change, blocks = self.plan.change, []
        with writing_model(change.model({}), change.skeleton, output, trust_remote_code) as files:
            for new, block in self.narrow_blocks():
                files.add_block(change.model(new), self.judged.arch.blocks[block.block].path)
                blocks.append(block)
            files.finish()
            report = self.report(str(output), blocks)
            files.add_report(file_names.NARROWED, report.to_json())

        return report
