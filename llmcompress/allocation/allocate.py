"""Choose steps for a target: a job with a target in, a job with one rule for every group of equal layers out.

    job with a target -> choices -> prices -> one option for each matrix -> job without a target, ready to run

Prices do not depend on the size of the target, so one list serves many. The price list and the plan are stored in
`allocation.json` beside the report, so another plan can be made from them without the model.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.allocation.baselines import predicted_baselines
from llmcompress.allocation.choices import Choices, Steps, choices
from llmcompress.allocation.cost import pricing_bytes
from llmcompress.allocation.distortion import families
from llmcompress.allocation.prices import Priced, Progress, damage, prices
from llmcompress.allocation.sensitivity import DensePredictions, Probe, in_parts, probe_windows
from llmcompress.allocation.solve import monotone, solve
from llmcompress.compression.job import Job
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens
from llmcompress.errors import InputError, MemoryLimitError, RecipeError, format_bytes
from llmcompress.methods.solvers.sparsity import kept_count
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.files.checkpoint import add_file
from llmcompress.models.files.file_names import ALLOCATION
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.rules import Rule
from llmcompress.recipe.target import Target
from llmcompress.runtime.memory import total_memory
from llmcompress.runtime.ranks import ALONE, Ranks

LOG = logging.getLogger("llmcompress")


@dataclass(frozen=True)
class Allocation:
    """The chosen options and their prices; another `chosen` makes another plan.

    `job`: the job with the target; `dense`: returns the dense model's predictions on the probing tokens, which the
    finished model is measured against.
    """

    job: Job
    choices: Choices
    prices: tuple[Priced, ...]
    chosen: tuple[int, ...]
    dense: Callable[[], DensePredictions]
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """The job's recipe without its target, and with the steps of every matrix."""
        return with_steps(self.job, self.choices, self.chosen)

    @property
    def settled(self) -> Job:
        """The job to run, with the chosen steps."""
        return self.job.with_recipe(self.recipe)

    def measured(self, folder: Path, device: str = "cpu") -> float:
        """Return KL(dense || the model in `folder`) on the probing tokens, in nats per token."""
        place = locate(str(folder), trust_remote_code=self.job.source.trust_remote_code)
        model, dense = load_model(place, device), self.dense()
        return dense.divergence(in_parts(model, dense.windows))

    def summary(self, measured_kl: float, size: int) -> dict[str, Any]:
        """Return the target, predictions and measurements; `size`: bytes of the finished weight files."""
        target = self.job.recipe.target
        return {
            "target": None if target is None else target.model_dump(mode="json", exclude_none=True),
            "predicted_kl": damage(self.prices, self.chosen),
            "measured_kl": measured_kl,
            "baselines": predicted_baselines(self.choices, self.prices, target_of(self.job), self.chosen),
            "predicted_bytes": self.choices.size(self.chosen),
            "measured_bytes": size,
            "bpw": self.choices.bpw(self.chosen),
            "sparsity": self.choices.sparsity(self.chosen),
            "probing_tokens": self.dense().tokens,
            "seconds": self.seconds,
            "notes": list(self.choices.notes),
        }

    def keep(self, folder: Path, summary: dict[str, Any]) -> None:
        """Write the price list and the plan into a finished checkpoint. Raises DiskError if it cannot be written."""
        rows = [one.to_json() | {"chosen": option} for one, option in zip(self.prices, self.chosen, strict=True)]
        entries = summary | {"fixed_bytes": self.choices.fixed_bytes, "matrices": rows}
        add_file(folder, ALLOCATION, json.dumps(entries, indent=1))


@dataclass(frozen=True)
class PriceList:
    """The size and cost of every option of a job's matrices, for all targets of the kind that its recipe has.

    `dense`: as in an `Allocation`; `seconds`: the time of the measurements.
    """

    job: Job
    choices: Choices
    prices: tuple[Priced, ...]
    dense: Callable[[], DensePredictions]
    seconds: float

    def reaching(self, target: Target) -> Allocation:
        """Return the plan for a target of the same kind (bits per weight and bytes are two kinds). Raises RecipeError
        for a target that no choice reaches."""
        started = time.monotonic()
        chosen = choose(self.choices, self.prices, target)
        target = target.for_engine(target_of(self.job).engine)
        job = replace(self.job, recipe=self.job.recipe.model_copy(update={"target": target}))
        seconds = self.seconds + time.monotonic() - started
        return Allocation(job, self.choices, self.prices, chosen, self.dense, seconds)


def allocate(job: Job, *, device: str = "cpu", progress: Progress | None = None) -> Allocation:
    """Choose an option for every matrix that a job with a target leaves open.

    Raises RecipeError for a target that no choice reaches, if possible from headers before anything is measured. Also
    raises what the walk and the methods raise.
    """
    target = target_of(job)
    found = reachable(job, (target,))
    return price(job, found, priced_tokens(job), device=device, progress=progress).reaching(target)


def target_of(job: Job) -> Target:
    """Return the target of the job's recipe. Raises RecipeError if it has none."""
    if job.recipe.target is None:
        raise RecipeError("there is nothing to choose steps for; give a recipe with a target")
    return job.recipe.target


def text_of(job: Job) -> Calibration:
    """Return the text that options are judged on. Raises RecipeError for a recipe without calibration."""
    if job.recipe.calibration is None:
        raise RecipeError("options are judged on text; give a recipe with calibration")
    return job.recipe.calibration


def reachable(job: Job, targets: Sequence[Target]) -> Choices:
    """Return what the job leaves to choose, from headers alone; the targets are of its recipe's kind.

    Raises RecipeError for a target below the size of the cheapest options, and for any fault in the recipe or options.
    """
    job.check_rules()
    found = choices(job)
    for note in found.notes:
        LOG.warning(note)
    for target in targets:
        _check_reachable(found, target)
    return found


def price(
    job: Job,
    found: Choices,
    tokens: CalibrationTokens,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> PriceList:
    """Measure what every choice costs, on the `priced_tokens` of the job. Streams the dense model.

    Several processes share the blocks; all of them get the list, which is that of one process.

    Raises MemoryLimitError if it does not fit, InputError for too little text, and what the walk and the methods raise.
    """
    started = time.monotonic()
    with ranks.agree_on_errors():
        probe = probe_of(job, found, tokens, device, ranks)
    priced, dense = prices(job, found, tokens, probe, device, progress, ranks), probe.dense
    return PriceList(job, found, priced, lambda: dense, time.monotonic() - started)


def probe_of(job: Job, found: Choices, tokens: CalibrationTokens, device: str, ranks: Ranks) -> Probe:
    """Return the probe that measures options. Raises MemoryLimitError where the share of a process does not fit."""
    windows = probe_windows(tokens.sequences[tokens.obtained - tokens.held_out :])
    _check_memory(job, found, windows, device, ranks)
    return Probe(job.source, job.arch, windows, device)


def priced_tokens(job: Job) -> CalibrationTokens:
    """Return the calibration tokens, the same as in the run. Raises InputError if none of them is held out."""
    source = job.source
    found = calibration_tokens(text_of(job), source.tokenizer(), source.load, source.config)
    if not found.held_out:
        raise InputError(
            f"the calibration text gives {found.obtained} sequences, none of which is held out to judge options on; "
            f"give more text"
        )
    return found


def _check_memory(job: Job, found: Choices, windows: Tensor, device: str, ranks: Ranks) -> None:
    """Raise MemoryLimitError if measuring the options would not fit into this machine."""
    needed = ranks.here * pricing_bytes(job, found, windows.numel(), ranks.count)
    there = total_memory()
    if device == "cpu" and needed > there:
        raise MemoryLimitError(
            f"choosing steps for a target of {job.source.name} takes about {format_bytes(needed)}, and this machine "
            f"has {format_bytes(there)}; take a larger machine, or write rules in place of the target"
        )


def _check_reachable(found: Choices, target: Target) -> None:
    """Raise RecipeError for a size below the sum of the cheapest options, and for more zeros than any give."""
    least = tuple(one.bytes.index(min(one.bytes)) for one in found.matrices)
    bpw, size = found.bpw(least), found.size(least)
    if target.bpw is not None and bpw is not None and bpw > target.bpw:
        raise RecipeError(
            f"target: {target.bpw:g} bpw cannot be reached, {math.ceil(bpw * 1000) / 1000} is the least that the "
            f"options can do; raise it, or give options with fewer bits"
        )
    if target.sparsity is not None:
        _check_zeros(found, target.sparsity)
    if target.bytes is not None and size > target.bytes:
        raise RecipeError(
            f"target: {target.bytes:,} bytes cannot be reached, {size:,} is the least that the options can do; raise "
            f"it, or give options with fewer bits"
        )


def _check_zeros(found: Choices, sparsity: float) -> None:
    """Raise RecipeError for more zeros than the options give."""
    fewest = [one.kept.index(min(one.kept)) for one in found.matrices]
    if found.kept(fewest) > kept_count(found.weights, sparsity):
        most = math.floor((found.sparsity(fewest) or 0.0) * 1000) / 1000
        raise RecipeError(
            f"target: a sparsity of {sparsity:g} cannot be reached, {most} is the most that the options can do; lower "
            f"it, or give options that prune more"
        )


def choose(found: Choices, priced: Sequence[Priced], target: Target) -> tuple[int, ...]:
    """Return the options that meet a target: the least damage at a size or at a number of zeros, or the least size at a
    damage.

    Raises RecipeError for a target that no choice reaches.
    """
    _check_reachable(found, target)
    damages = [_smoothed(one) for one in priced]
    if target.kl is not None:
        chosen = solve([one.bytes for one in found.matrices], damages, target.kl)
    else:
        chosen = solve(damages, [one.counted(target) for one in found.matrices], found.room(target))
    if chosen is None:
        raise RecipeError(
            f"target: a KL of {target.kl} cannot be reached, {sum(map(min, damages)):.2g} is the least that is "
            f"predicted for the options; raise it, or give options with more bits"
        )
    return chosen


def _smoothed(one: Priced) -> list[float]:
    """Return the damages of a matrix's options, made monotone in bits within each family.

    Families stay apart: one that is bad at many bits says nothing about a better one at fewer.
    """
    found = [offer.damage for offer in one.offers]
    for family in families([offer.steps for offer in one.offers]):
        rising = monotone([found[number] for number in family], [one.offers[number].bits for number in family])
        for number, value in zip(family, rising, strict=True):
            found[number] = value
    return found


def with_steps(job: Job, found: Choices, chosen: Sequence[int]) -> Recipe:
    """Return the job's recipe without its target and with the chosen option of each matrix: after its own rules, one
    rule for all matrices with the same steps."""
    groups: dict[Steps, list[str]] = {}
    tables: dict[str, Steps] = {}
    for one, option in zip(found.matrices, chosen, strict=True):
        if one.is_table:
            tables["embeddings" if one.name == job.arch.embedding else "head"] = one.options[option]
        else:
            groups.setdefault(one.options[option], []).append(one.name)
    rules = (*job.recipe.rules, *(Rule(match=tuple(names), steps=steps) for steps, names in groups.items()))
    without_target = {"target": None, "options": None, "damage": "distortion"}
    return Recipe(**{**dict(job.recipe), **without_target, "rules": rules, **tables})
