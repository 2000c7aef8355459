"""One change of a mixture's experts, whatever becomes of them: the text that judges it, its files and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.calibration.walk import Progress
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import NumericsError, RecipeError, list_names
from llmcompress.models.files import file_names
from llmcompress.models.files.output import check_writable
from llmcompress.recipe.calibration import Calibration
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.surgery.edited_model import ChangedConfig, NewTensor, writing_model
from llmcompress.surgery.experts.mixture import ExpertBlock, ExpertMixture, Usage, open_block, open_mixture
from llmcompress.surgery.judged_walk import JudgedWalk, judged_calibration, read_tokens

Way = Literal["prune", "merge", "condense", "replace"]
Fate = Literal["kept", "dropped", "merged", "folded", "replaced"]
SAMPLES, HELD_OUT = 20, 4  # of text: 8192 tokens to count, 2048 to judge


@dataclass(frozen=True)
class ExpertFate:
    """One expert. `tokens`: calibration tokens routed to it; `router_weight`: the mean of the router's weights on
    them; `score`: see `ExpertScore`, None where there is none; `becomes`: its number in the new model, None for one
    that has none; `weight`: the constant that a folded one is multiplied by; `rank`: of the factors that replace it."""

    number: int
    fate: Fate
    tokens: int
    router_weight: float
    score: float | None = None
    becomes: int | None = None
    weight: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class BlockFate:
    """The experts of one block. `damage`: see `Visit.damage`; `shared_weights`: constants of shared experts that were
    folded; `considered`: the damage of condensing it, None where that was no candidate."""

    block: int
    path: str
    damage: float
    experts: tuple[ExpertFate, ...]
    shared_weights: tuple[float, ...] = ()
    considered: float | None = None


@dataclass(frozen=True)
class ExpertsReport(JsonRecord):
    """The fates of a mixture's experts. `output` is None where nothing was written; bytes count the weights."""

    model: str
    output: str | None
    way: Way
    settings: dict[str, Any]
    experts_before: int
    experts_after: int
    bytes_before: int
    bytes_after: int
    calibration: dict[str, Any]
    blocks: tuple[BlockFate, ...]
    warnings: tuple[str, ...]


def expert_fates(
    usage: Usage, fate_of: Mapping[int, Fate], scores: Tensor | None = None, **more: Mapping[int, Any]
) -> tuple[ExpertFate, ...]:
    """Return the rows of a block's experts; `more`: further fields, each by the expert's number."""
    rows = []
    for number, count in enumerate(usage.counts.tolist()):
        weight = float(usage.weights[number]) / count if count else 0.0
        score = None if scores is None else float(scores[number])
        own = {name: values[number] for name, values in more.items() if number in values}
        rows.append(ExpertFate(number, fate_of[number], count, weight, score, **own))
    return tuple(rows)


@dataclass(frozen=True, eq=False)
class ExpertsOutcome:
    """The fates of experts before anything is written. `experts`: in each block that still has some."""

    way: Way
    settings: dict[str, Any]
    experts: int
    blocks: Sequence[BlockFate]


@dataclass(frozen=True, eq=False)
class ExpertsJob:
    """A change of a mixture. `output`: the new folder, None to write nothing; `calibration`: the text to judge by."""

    mixture: ExpertMixture
    output: Path | None
    calibration: Calibration
    device: torch.device
    progress: Progress | None

    @cached_property
    def tokens(self) -> CalibrationTokens:
        """The tokens of the calibration. Raises InputError for a text that cannot serve."""
        return read_tokens(self.mixture.source, self.calibration)

    def blocks(self) -> Iterator[ExpertBlock]:
        """Yield the blocks with experts in depth order, each loaded."""
        judged = JudgedWalk(self.mixture.source, self.mixture.arch, self.tokens, self.device, self.progress)
        for visit in judged.visits():
            if visit.block.index in self.mixture.layers:
                yield open_block(visit, self.mixture.layers[visit.block.index])

    def count_of(self, wanted: float, option: str) -> int:
        """Return the number of experts that a share below 1, or a count, stands for. Raises RecipeError for neither."""
        total = self.mixture.experts
        if not 0 < wanted < total or (wanted >= 1 and wanted != int(wanted)):
            raise RecipeError(
                f"{option} is {wanted:g}, where a block has {total} experts; give a share below 1, or a whole number "
                f"from 1 to {total - 1}"
            )
        return max(1, round(wanted * total)) if wanted < 1 else int(wanted)

    def change_blocks(
        self, change: ChangedConfig, treat: Callable[[ExpertBlock], tuple[dict[str, NewTensor], tuple[ExpertFate, ...]]]
    ) -> tuple[dict[str, NewTensor], list[BlockFate]]:
        """Return the new tensors of all blocks, and their fates; `treat` returns both for a block's experts."""
        rows: list[BlockFate] = []
        new: dict[str, NewTensor] = {}
        for block in self.blocks():
            tensors, experts = treat(block)
            damage = block.visit.damage_by(change.model(tensors), change.skeleton)
            rows.append(BlockFate(block.number, block.path, damage, experts))
            new |= tensors
        return new, rows

    def write(self, change: ChangedConfig, new: Mapping[str, NewTensor], outcome: ExpertsOutcome) -> ExpertsReport:
        """Write the changed model with its report, if an output is given, and return the report.

        Raises InputError for a change that the model's type does not allow, DiskError for an output that cannot be
        written.
        """
        model = change.complete(new)
        warnings = (*self.mixture.source.notes, *self.tokens.notes, *unused_experts(outcome.blocks))
        report = self.report(outcome, model.bytes, warnings)
        if self.output is not None:
            with writing_model(model, change.skeleton, self.output) as files:
                for block in self.mixture.arch.blocks:
                    files.add_block(model, block.path)
                files.finish()
                files.add_report(file_names.EXPERTS, report.to_json())
        return report

    def report(self, outcome: ExpertsOutcome, size: int, warnings: tuple[str, ...]) -> ExpertsReport:
        """Return the report on new weights of `size` bytes."""
        source = self.mixture.source
        return ExpertsReport(
            model=source.public_name,
            output=None if self.output is None else str(self.output),
            way=outcome.way,
            settings=outcome.settings,
            experts_before=self.mixture.experts,
            experts_after=outcome.experts,
            bytes_before=source.bytes,
            bytes_after=size,
            calibration=self.tokens.report(),
            blocks=tuple(outcome.blocks),
            warnings=warnings,
        )


def open_job(
    model: str | Path,
    output: str | Path | None,
    text: str,
    samples: int,
    revision: str | None,
    device: str,
    progress: Progress | None,
) -> ExpertsJob:
    """Return the job on the mixture that `model` names.

    Raises RecipeError for too few samples, InputError for another model, DiskError for an output that cannot be made.
    """
    place, target = device_of(device), None if output is None else Path(output)
    if target is not None:
        check_writable(target, 0)
    mixture = open_mixture(model, revision)
    calibration = judged_calibration(mixture.source, text, samples, SAMPLES // HELD_OUT)
    return ExpertsJob(mixture, target, calibration, place, progress)


def unused_experts(blocks: Sequence[BlockFate]) -> tuple[str, ...]:
    """Return a sentence if the text has reached some experts with no token. Raises NumericsError for a damage that is
    no number."""
    broken = next((block for block in blocks if not isfinite(block.damage)), None)
    if broken is not None:
        raise NumericsError(f"{broken.path}: its outputs became NaN or Inf; use an undamaged checkpoint")
    names = [f"{block.path}.{row.number}" for block in blocks for row in block.experts if not row.tokens]
    total = sum(len(block.experts) for block in blocks)
    if not names:
        return ()
    return (
        f"{len(names)} of {total} experts got no token of the text ({list_names(names)}), so nothing is known of them; "
        f"more text helps",
    )
