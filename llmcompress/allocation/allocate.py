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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.allocation.choices import Choices, Steps, find_choices
from llmcompress.allocation.cost import pricing_bytes
from llmcompress.allocation.distortion import families
from llmcompress.allocation.prices import MatrixPrices, Progress, damage, measure_matrices, note_unreached, prices_of
from llmcompress.allocation.sensitivity import Probe, probe_windows
from llmcompress.allocation.solve import monotone, predicted_baselines, solve
from llmcompress.compression.job import Job
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import InputError, MemoryLimitError, RecipeError, format_bytes
from llmcompress.evaluation.distance import distance
from llmcompress.evaluation.logits import OnDisk
from llmcompress.evaluation.perplexity import predicted_tokens
from llmcompress.methods.solvers.sparsity import kept_count
from llmcompress.models.dense.locate import locate
from llmcompress.models.files.checkpoint import add_file
from llmcompress.models.files.compressed import decoded_source
from llmcompress.models.files.file_names import ALLOCATION
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.rules import Rule
from llmcompress.recipe.target import Target
from llmcompress.runtime.memory import total_memory
from llmcompress.runtime.phases import time_phases
from llmcompress.runtime.ranks import ALONE, Ranks

LOG = logging.getLogger("llmcompress")
CHOICE_KEYS = ("target", "options", "damage", "rules", "embeddings", "head")  # keys of a recipe that a plan replaces

RANGE = (0.55, 1.3)  # of the predicted KL: holds the measured one in 25 of 26 plans of three models, docs/results


@dataclass(frozen=True)
class Allocation:
    """The chosen options and their prices; another `chosen` makes another plan.

    `job`: the job with the target. `windows`: the probing tokens `[windows, length]`, on which the finished model is
    compared with the dense one.
    """

    job: Job
    choices: Choices
    prices: tuple[MatrixPrices, ...]
    chosen: tuple[int, ...]
    windows: Tensor
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """The job's recipe without its target, and with the steps of every matrix."""
        return with_steps(self.job, self.choices, self.chosen)

    @property
    def settled(self) -> Job:
        """The job to run, with the chosen steps."""
        return self.job.with_recipe(self.recipe)

    def measure_kl(self, folder: Path, device: str = "cpu") -> float:
        """Return KL(dense || the model in `folder`) on the probing tokens, in nats per token."""
        place = locate(str(folder), trust_remote_code=self.job.source.trust_remote_code)
        models = OnDisk(self.job.source, device), OnDisk(decoded_source(place), device)
        return distance(*models, self.windows).kl

    def summary(self, measured_kl: float, size: int) -> dict[str, Any]:
        """Return the target, predictions and measurements; `size`: bytes of the finished weight files."""
        target, predicted = target_of(self.job), damage(self.prices, self.chosen)
        return {
            "target": target.model_dump(mode="json", exclude_none=True),
            "predicted_kl": predicted,
            "predicted_range": [share * predicted for share in RANGE],
            "measured_kl": measured_kl,
            "baselines": predicted_baselines(self.choices, self.prices, target, self.chosen),
            "predicted_bytes": self.choices.size(self.chosen),
            "measured_bytes": size,
            "bpw": self.choices.bpw(self.chosen),
            "sparsity": self.choices.sparsity(self.chosen),
            "probing_tokens": predicted_tokens(self.windows),
            "seconds": self.seconds,
            "notes": [*self.choices.notes, *note_unreached(self.prices)],
        }

    def write(self, folder: Path, summary: dict[str, Any]) -> None:
        """Write the price list and the plan into a finished checkpoint. Raises DiskError if it cannot be written."""
        pairs = zip(self.prices, self.chosen, strict=True)
        rows = [matrix.to_json() | {"chosen": option} for matrix, option in pairs]
        before = self.job.recipe.model_dump(mode="json", include=set(CHOICE_KEYS))
        entries = summary | {"asked": before, "fixed_bytes": self.choices.fixed_bytes, "matrices": rows}
        add_file(folder, ALLOCATION, json.dumps(entries, indent=1))


@dataclass(frozen=True)
class PriceList:
    """The size and cost of every option of a job's matrices, for all targets of the kind that its recipe has.

    `windows`: as in an `Allocation`; `seconds`: the time of the measurements.
    """

    job: Job
    choices: Choices
    prices: tuple[MatrixPrices, ...]
    windows: Tensor
    seconds: float

    def reaching(self, target: Target) -> Allocation:
        """Return the plan for a target of the same kind (bits per weight and bytes are two kinds).

        Raises RecipeError for a target that no choice reaches.
        """
        started = time.monotonic()
        target = target.for_engine(target_of(self.job).engine)
        chosen = choose(self.choices, self.prices, target)
        job = replace(self.job, recipe=self.job.recipe.model_copy(update={"target": target}))
        seconds = self.seconds + time.monotonic() - started
        return Allocation(job, self.choices, self.prices, chosen, self.windows, seconds)


def allocate(job: Job, *, device: str = "cpu", progress: Progress | None = None) -> Allocation:
    """Choose an option for every matrix that a job with a target leaves open.

    Raises RecipeError for a target that no choice reaches, if possible from headers before anything is measured. Also
    raises what the walk and the methods raise.
    """
    target = target_of(job)
    choices = reachable_choices(job, (target,))
    return measure_prices(job, choices, priced_tokens(job), device=device, progress=progress).reaching(target)


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


def reachable_choices(job: Job, targets: Sequence[Target]) -> Choices:
    """Return what the job leaves to choose, from headers alone; the targets are of its recipe's kind.

    Raises RecipeError for a target below the size of the cheapest options, and for any fault in the recipe or options.
    """
    job.check_rules()
    choices = find_choices(job)
    for note in choices.notes:
        LOG.warning(note)
    for target in targets:
        _check_reachable(choices, target)
    return choices


def measure_prices(
    job: Job,
    choices: Choices,
    tokens: CalibrationTokens,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> PriceList:
    """Measure what every choice costs, on the `priced_tokens` of the job. Streams the dense model.

    Several processes share the blocks; all of them get the list, which is that of one process. Raises MemoryLimitError
    if it does not fit, InputError for too little text, and what the walk and the methods raise.
    """
    started = time.monotonic()
    with ranks.agree_on_errors():
        probe = make_probe(job, choices, tokens, device, ranks)
    with time_phases("prices"), ranks.agree_on_errors():
        own = measure_matrices(job, choices, tokens, probe, device, progress, ranks)
    prices = prices_of(choices, ranks.gather(own))
    return PriceList(job, choices, prices, probe.windows, time.monotonic() - started)


def make_probe(job: Job, choices: Choices, tokens: CalibrationTokens, device: str, ranks: Ranks) -> Probe:
    """Return the probe that measures options. Raises MemoryLimitError if the share of a process does not fit."""
    windows = probe_windows(tokens)
    needed, total = ranks.here * pricing_bytes(job, choices, windows.numel(), ranks.count), total_memory()
    if device == "cpu" and needed > total:
        raise MemoryLimitError(
            f"choosing steps for a target of {job.source.name} takes about {format_bytes(needed)}, and this machine "
            f"has {format_bytes(total)}; take a larger machine, or write rules in place of the target"
        )
    return Probe(job.source, job.arch, windows, device)


def priced_tokens(job: Job) -> CalibrationTokens:
    """Return the calibration tokens, the same as in the run. Raises InputError if none of them is held out."""
    tokens = job.read_tokens(text_of(job))
    if not tokens.held_out:
        raise InputError(
            f"the calibration text gives {tokens.obtained} sequences, none of which is held out to judge options on; "
            f"give more text"
        )
    return tokens


def _check_reachable(choices: Choices, target: Target) -> None:
    """Raise RecipeError for a size below the sum of the cheapest options, and for more zeros than any give."""
    least = choices.cheapest([matrix.bytes for matrix in choices.matrices])
    bpw, size = choices.bpw(least), choices.size(least)
    if target.bpw is not None and bpw is not None and bpw > target.bpw:
        raise RecipeError(
            f"target: {target.bpw:g} bpw cannot be reached, {math.ceil(bpw * 1000) / 1000} is the least that the "
            f"options can do; raise it, or give options with fewer bits"
        )
    if target.sparsity is not None:
        fewest = choices.cheapest([matrix.nonzero for matrix in choices.matrices])
        if choices.nonzero(fewest) > kept_count(choices.weights, target.sparsity):
            most = math.floor((choices.sparsity(fewest) or 0.0) * 1000) / 1000
            raise RecipeError(
                f"target: a sparsity of {target.sparsity:g} cannot be reached, {most} is the most that the options can "
                f"do; lower it, or give options that prune more"
            )
    if target.bytes is not None and size > target.bytes:
        raise RecipeError(
            f"target: {target.bytes:,} bytes cannot be reached, {size:,} is the least that the options can do; raise "
            f"it, or give options with fewer bits"
        )


def choose(choices: Choices, prices: Sequence[MatrixPrices], target: Target) -> tuple[int, ...]:
    """Return the options that meet a target: of the least damage at a size or a number of zeros, or of the least size.

    Raises RecipeError for a target that no choice reaches.
    """
    _check_reachable(choices, target)
    damages = choices.add_rows([_monotone_damages(matrix) for matrix in prices])
    if target.kl is not None:
        chosen = solve(choices.add_rows([matrix.bytes for matrix in choices.matrices]), damages, target.kl)
    else:
        costs = choices.add_rows([matrix.costs(target) for matrix in choices.matrices])
        chosen = solve(damages, costs, choices.room(target))
    if chosen is None:
        raise RecipeError(
            f"target: a KL of {target.kl} cannot be reached, {sum(map(min, damages)):.2g} is the least that is "
            f"predicted for the options; raise it, or give options with more bits"
        )
    return choices.expand(chosen)


def _monotone_damages(prices: MatrixPrices) -> list[float]:
    """Return the damages of a matrix's options, made monotone in bits within each family.

    Families stay apart: one that is bad at many bits says nothing about a better one at fewer.
    """
    offers = prices.offers
    damages = [offer.damage for offer in offers]
    for family in families([offer.steps for offer in offers]):
        rising = monotone([damages[number] for number in family], [offers[number].bits for number in family])
        for number, value in zip(family, rising, strict=True):
            damages[number] = value
    return damages


def with_steps(job: Job, choices: Choices, chosen: Sequence[int]) -> Recipe:
    """Return the job's recipe without its target and with the chosen option of each matrix.

    After its own rules comes one rule for all matrices with the same steps.
    """
    groups: dict[Steps, list[str]] = {}
    tables: dict[str, Steps] = {}
    for matrix, option in zip(choices.matrices, chosen, strict=True):
        if matrix.is_table:
            tables["embeddings" if matrix.name == job.arch.embedding else "head"] = matrix.options[option]
        else:
            groups.setdefault(matrix.options[option], []).append(matrix.name)
    rules = (*job.recipe.rules, *(Rule(match=tuple(names), steps=steps) for steps, names in groups.items()))
    without_target = {"target": None, "options": None, "damage": "distortion"}
    return Recipe(**{**dict(job.recipe), **without_target, "rules": rules, **tables})
