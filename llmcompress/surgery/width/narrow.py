"""Narrower blocks: neurons and heads that a layer needs least go, and what reads the others makes up for them.

Blocks are narrowed in their order, each on what the narrower blocks before it give. The result is a plain dense
checkpoint of the same architecture, with fewer `intermediate_size` or heads in its config. Where every block has a
width of its own, for which configs have no place, it is one that llmcompress helps transformers to load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.blocks import TOKENS_PER_BATCH, in_batches
from llmcompress.calibration.walk import Block, Progress, walk
from llmcompress.compression.damage import judged_calibration, outputs_of, relative_damage
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens
from llmcompress.errors import NumericsError
from llmcompress.methods.moments import Moments
from llmcompress.methods.solvers.hessian import damped, second_moment
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel, open_source
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import writing
from llmcompress.models.files.staging import check_output
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.surgery.edited_model import EditedFiles, Made
from llmcompress.surgery.width.by_block import tried_widths, width_prices
from llmcompress.surgery.width.select import DAMPING, Subset, check_by, chosen_subset
from llmcompress.surgery.width.units import Cut, Narrowing, Part, check_unequal, narrowing, step_of, unequal

SAMPLES, HELD_OUT = 36, 4  # of text: 16,384 tokens to choose by, 2048 to judge on


@dataclass(frozen=True)
class PartFate:
    """Units of one kind in a block. `kept`: the numbers of those that stay; `error`: what the others' absence does to
    the outputs of the layer that read them, as a share of their energy, once it is made up for."""

    part: str
    kept: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class NarrowedBlock:
    """One block. `damage`: the change of its outputs on held-out text, the mean over tokens of its squared size
    relative to the output's."""

    block: int
    damage: float
    parts: tuple[PartFate, ...]


Walked = Iterator[tuple[dict[str, Made], NarrowedBlock]]  # narrower tensors of each block, and its fate


@dataclass(frozen=True)
class Narrowed(JsonRecord):
    """The narrower model. `before` and `after`: units of each kind in every block, on average where `per_block`, when
    each has a width of its own; `damage`: then the KL in nats per token that blocks narrowed one by one add up to;
    `output` is None where nothing was written; bytes count the weights."""

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
) -> Narrowed:
    """Write a dense model with fewer neurons or heads in every block, one block at a time; stock transformers loads it.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        output: a new or empty folder; None to look at the plan and write nothing.
        neurons: of each feed-forward layer that stay, or their share below 1; None for all.
        kv_heads: key-value heads that stay in each block, each with the query heads that read it; None for all.
        per_block: True to give each block units as predictions need them there, in the bytes that `neurons` and
            `kv_heads` make everywhere. Reads the text once more, and llmcompress has to be installed where the result
            is loaded.
        by: `energy`, `subset` or `random`; see `chosen_subset`.
        text: what is read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens that are read, a ninth of them to judge on.
        seed: of `random`.
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
    place = device_of(device)
    check_by(by)
    if output is not None:
        check_output(Path(output), 0)
    source = open_source(locate(model, revision, trust_remote_code))
    arch = architecture(source.config, source.skeleton())
    plan = narrowing(source, arch, neurons, kv_heads)
    if per_block:
        check_unequal(arch, plan)
    job = _Job(source, arch, plan, _tokens(source, text, samples), by, seed)
    if per_block:
        widths, damage = job.widths(place, progress)
        job = replace(job, plan=unequal(arch, plan, widths), damage=damage)
    walked = job.blocks(place, progress)
    if output is None:
        return job.report(None, [block for _, block in walked])
    return _write(job, walked, Path(output), trust_remote_code)


def _tokens(source: DenseModel, text: str, samples: int) -> CalibrationTokens:
    """Return the tokens to choose by and to judge on. Raises RecipeError for too few samples, InputError for a text
    that cannot serve."""
    asked = judged_calibration(source, text, samples, SAMPLES // HELD_OUT)
    return calibration_tokens(asked, source.tokenizer(), source.load, source.config)


@dataclass(frozen=True, eq=False)
class _Job:
    """A model to narrow. `by` and `seed`: how units are chosen, see `chosen_subset`; `damage`: see `Narrowed`."""

    source: DenseModel
    arch: Architecture
    plan: Narrowing
    tokens: CalibrationTokens
    by: str
    seed: int
    damage: float | None = None

    def widths(self, device: torch.device, progress: Progress | None) -> tuple[tuple[dict[Part, int], ...], float]:
        """Return the units that each block is to have of its own, with at most the weights that the plan has, and the
        damage to predictions that they add up to."""
        how: dict[str, Any] = {"by": self.by, "seed": self.seed, "device": device, "progress": progress}
        equal = {cut.part: cut.keep for cut in self.plan.cuts[0]}
        tried = {
            part: tried_widths(total, equal[part], step_of(total) if part == "neurons" else 1)
            for part, total in self.plan.before.items()
        }
        prices = width_prices(self.source, self.arch, self.tokens, self.plan.cuts, tried, **how)
        return prices.chosen(equal)

    def blocks(self, device: torch.device, progress: Progress | None) -> Walked:
        """Yield the narrower tensors of each block, and its fate, in order."""
        sequences = self.tokens.sequences
        size = max(1, TOKENS_PER_BATCH // sequences.shape[1])
        batches = in_batches(len(sequences), self.tokens.held_out, size)
        judged = [batch for batch in batches if batch.held_out]
        needs = {cut.consumer.name: frozenset({"outer"}) for cuts in self.plan.cuts for cut in cuts}
        how: dict[str, Any] = {"needs": needs, "batch_size": size, "device": device, "progress": progress}
        for block in walk(self.source, self.arch, sequences, held_out=self.tokens.held_out, **how):
            if block.run is None:
                continue
            before = outputs_of(block.run, block.hidden, judged)
            made, fates = self._narrowed(block)
            damage = relative_damage(block.run, block.hidden, judged, before)
            if not isfinite(damage):
                raise NumericsError(f"{block.path}: its outputs became NaN or Inf; use an undamaged checkpoint")
            yield made, NarrowedBlock(block.index, damage, fates)

    @torch.no_grad()
    def _narrowed(self, block: Block) -> tuple[dict[str, Made], tuple[PartFate, ...]]:
        """Choose the units of a loaded block, which the walk goes on with; return its new tensors and their fate.

        The block keeps its shapes: columns of what reads the units that go become zero, which gives the same outputs.
        """
        made: dict[str, Made] = {}
        fates = []
        for number, cut in enumerate(self.plan.cuts[block.index]):
            name = cut.consumer.name
            if number and block.gather is not None:
                group = block.gather((name,))  # the cut before has changed its inputs
            else:
                group = next(one for one in block.groups if name in one.names)
            found = self._chosen(cut, block.weight(name), group.inputs)
            parameter = block.module.get_submodule(name.removeprefix(f"{block.path}.")).get_parameter("weight")
            parameter.copy_(found.weight.T if cut.consumer.transposed else found.weight)
            made |= cut.tensors(self.source, found.kept, found.weight)
            fates.append(PartFate(cut.part, found.kept, found.error))
        return made, tuple(fates)

    def _chosen(self, cut: Cut, weight: Tensor, inputs: Moments) -> Subset:
        hessian = damped(second_moment(inputs), DAMPING)
        return chosen_subset(weight, hessian, cut.keep, cut.size, by=self.by, seed=self.seed)

    def report(self, output: str | None, blocks: list[NarrowedBlock]) -> Narrowed:
        """Return the report on all blocks, written to `output` or only looked at."""
        source, plan = self.source, self.plan
        return Narrowed(
            model=source.public_name,
            output=output,
            before={str(part): count for part, count in plan.before.items()},
            after={str(part): count for part, count in plan.after.items()},
            by=self.by,
            per_block=self.damage is not None,
            damage=self.damage,
            bytes_before=source.bytes,
            bytes_after=plan.change.model({}).bytes,
            calibration=self.tokens.report(),
            blocks=tuple(blocks),
            warnings=(*source.notes, *self.tokens.notes),
        )


def _write(job: _Job, walked: Walked, output: Path, trust_remote_code: bool) -> Narrowed:
    """Write the narrower model to the folder `output` while its blocks are made, and return the report."""
    change = job.plan.change
    new = change.model({})
    with writing(output, new.bytes) as writer:
        companions(job.source.folder, trust_remote_code).copy(writer.folder)
        files, blocks = EditedFiles(new, change.skeleton, writer), []
        for made, block in walked:
            files.add_block(change.model(made), job.arch.blocks[block.block].path)
            blocks.append(block)
        files.finish()
        report = job.report(str(output), blocks)
        writer.write(file_names.NARROWED, json.dumps(report.to_json() | {"output": None}, indent=1))
    return report
