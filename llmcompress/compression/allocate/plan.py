"""A recipe with a target in, a recipe with one rule for every group of equal layers out.

    recipe with a target -> choices -> prices -> one option for each matrix -> recipe -> the driver, as ever

Prices do not depend on how large a target is, so one list serves many. The price list and the plan travel in
`allocation.json` beside the report, so that another plan can be made of them without the model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.compression.allocate.choices import Choices, Steps, choices
from llmcompress.compression.allocate.distortion import families
from llmcompress.compression.allocate.prices import Priced, Progress, prices
from llmcompress.compression.allocate.sensitivity import DensePredictions, Probe, in_parts, probe_windows
from llmcompress.compression.allocate.solve import monotone, solve
from llmcompress.compression.plan import Job, prepare
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens
from llmcompress.errors import InputError, MemoryLimitError, RecipeError
from llmcompress.models.checkpoint import add_file, megabytes
from llmcompress.models.dense import DenseModel, load_model
from llmcompress.models.file_names import ALLOCATION
from llmcompress.models.locate import Place, locate
from llmcompress.recipe.compression import Recipe, Rule
from llmcompress.recipe.target import Target
from llmcompress.runtime.memory import total_memory
from llmcompress.weight.modules import decoded

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and why; with another `chosen`, another plan. `job`: the recipe with its target, laid over the
    model; `dense`: gives what the dense model predicts on the probing tokens, to measure the finished model against."""

    job: Job
    choices: Choices
    prices: tuple[Priced, ...]
    chosen: tuple[int, ...]
    dense: Callable[[], DensePredictions]
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """What the driver runs: no target, and the steps of every matrix."""
        return with_steps(self.job, self.choices, self.chosen)

    def measured(self, folder: Path, device: str = "cpu") -> float:
        """KL(dense || the model in `folder`) on the probing tokens, in nats per token."""
        model, dense = load_model(locate(str(folder)), device), self.dense()
        with decoded(model):
            return dense.divergence(in_parts(model, dense.windows))

    def summary(self, measured_kl: float, size: int) -> dict[str, Any]:
        """What was aimed at, predicted and reached; `size`: bytes of the finished weight files."""
        target = self.job.recipe.target
        return {
            "target": None if target is None else target.model_dump(mode="json", exclude_none=True),
            "predicted_kl": damage(self.prices, self.chosen),
            "measured_kl": measured_kl,
            "predicted_bytes": self.choices.size(self.chosen),
            "measured_bytes": size,
            "bpw": self.choices.bpw(self.chosen),
            "probing_tokens": self.dense().tokens,
            "seconds": self.seconds,
        }

    def keep(self, folder: Path, summary: dict[str, Any]) -> None:
        """Writes the price list and the plan into a finished checkpoint. Raises DiskError if that cannot be."""
        rows = [one.to_json() | {"chosen": option} for one, option in zip(self.prices, self.chosen, strict=True)]
        entries = summary | {"fixed_bytes": self.choices.fixed_bytes, "matrices": rows}
        add_file(folder, ALLOCATION, json.dumps(entries, indent=1))


@dataclass(frozen=True)
class PriceList:
    """What every option of a job's matrices takes and costs, for all targets of the kind that its recipe has. `dense`:
    as in an `Allocation`; `seconds`: that the measurements took."""

    job: Job
    choices: Choices
    prices: tuple[Priced, ...]
    dense: Callable[[], DensePredictions]
    seconds: float

    def reaching(self, target: Target) -> Allocation:
        """The plan for a target; bits per weight and bytes are not of one kind. Raises RecipeError for one that no
        choice reaches."""
        started = time.monotonic()
        chosen = choose(self.choices, self.prices, target)
        job = replace(self.job, recipe=self.job.recipe.model_copy(update={"target": target}))
        seconds = self.seconds + time.monotonic() - started
        return Allocation(job, self.choices, self.prices, chosen, self.dense, seconds)


def damage(price_list: Sequence[Priced], chosen: Sequence[int]) -> float:
    """The predicted KL of a plan: that of its options, summed."""
    return sum(one.offers[option].damage for one, option in zip(price_list, chosen, strict=True))


def allocate(
    source: DenseModel, recipe: Recipe, *, device: str = "cpu", progress: Progress | None = None
) -> Allocation:
    """Chooses an option for everything that a recipe with a target leaves open. Holds the dense model in float32.

    Raises RecipeError for a target that no choice reaches, before anything is measured where headers tell, and what
    the walk and the methods raise.
    """
    if recipe.target is None:
        raise RecipeError("there is nothing to choose steps for; give a recipe with a target")
    job, found = reachable(source, recipe, (recipe.target,))
    return price(job, found, device=device, progress=progress).reaching(recipe.target)


def reachable(source: DenseModel, recipe: Recipe, targets: Sequence[Target]) -> tuple[Job, Choices]:
    """The recipe laid over the model, and what it leaves to choose, from headers alone; the targets are of its kind.

    Raises RecipeError for a target below what the cheapest options take, and for what is wrong with recipe or options.
    """
    job = prepare(source, recipe)
    if job.assignment.unmatched:
        raise RecipeError(job.assignment.complaint())
    found = choices(job)
    for target in targets:
        _check_reachable(found, target)
    return job, found


def price(job: Job, found: Choices, *, device: str = "cpu", progress: Progress | None = None) -> PriceList:
    """Measures what every choice costs, on the calibration text of the job's recipe. Holds the dense model in float32.

    Raises MemoryLimitError where that is too much, InputError for too little text, and what the walk and the methods
    raise.
    """
    started, source = time.monotonic(), job.source
    _check_memory(source, device)
    tokens = _tokens(job)
    windows = probe_windows(tokens.sequences[tokens.obtained - tokens.held_out :])
    probe = Probe(load_model(Place(source.name, source.folder), device), job.arch, windows)
    priced, dense = prices(job, found, tokens, probe, device, progress), probe.dense
    return PriceList(job, found, priced, lambda: dense, time.monotonic() - started)


def _tokens(job: Job) -> CalibrationTokens:
    """The calibration tokens, as the driver will have them. Raises InputError where none of them is held out."""
    source, config = job.source, job.recipe.calibration
    if config is None:
        raise RecipeError("options are judged on text; give a recipe with calibration")
    found = calibration_tokens(
        config, source.tokenizer(), partial(load_model, Place(source.name, source.folder)), source.config
    )
    if not found.held_out:
        raise InputError(
            f"the calibration text gives {found.obtained} sequences, none of which is held out to judge options on; "
            f"give more text"
        )
    return found


def _check_memory(source: DenseModel, device: str) -> None:
    """Raises MemoryLimitError where the dense model does not fit into this machine."""
    needed, there = FLOAT32 * source.parameters, total_memory()
    if device == "cpu" and needed > there:
        raise MemoryLimitError(
            f"choosing steps for a target holds all of {source.name} in float32, {megabytes(needed)}, and this machine "
            f"has {megabytes(there)}; take a larger machine, or write rules in place of the target"
        )


def _check_reachable(found: Choices, target: Target) -> None:
    """Raises RecipeError for a size below that of the cheapest options together."""
    least = tuple(one.bytes.index(min(one.bytes)) for one in found.matrices)
    bpw, size = found.bpw(least), found.size(least)
    if target.bpw is not None and bpw is not None and bpw > target.bpw:
        raise RecipeError(
            f"target: {target.bpw:g} bpw cannot be reached, {math.ceil(bpw * 1000) / 1000} is the least that the "
            f"options can do; raise it, or give options with fewer bits"
        )
    if target.bytes is not None and size > target.bytes:
        raise RecipeError(
            f"target: {target.bytes:,} bytes cannot be reached, {size:,} is the least that the options can do; raise "
            f"it, or give options with fewer bits"
        )


def choose(found: Choices, priced: Sequence[Priced], target: Target) -> tuple[int, ...]:
    """The options that a target asks for: the least damage at a size, or the least size at a damage.

    Raises RecipeError for a target that no choice reaches.
    """
    _check_reachable(found, target)
    damages = [_smoothed(one) for one in priced]
    sizes = [one.bytes for one in found.matrices]
    if target.bpw is not None:
        weights = found.fixed_weights + sum(prod(one.shape) for one in priced)
        chosen = solve(damages, [one.bits for one in found.matrices], target.bpw * weights - found.fixed_bits)
    elif target.bytes is not None:
        chosen = solve(damages, sizes, target.bytes - found.fixed_bytes)
    else:
        chosen = solve(sizes, damages, target.kl or 0.0)
    if chosen is None:
        raise RecipeError(
            f"target: a KL of {target.kl} cannot be reached, {sum(map(min, damages)):.2g} is the least that is "
            f"predicted of the options; raise it, or give options with more bits"
        )
    return chosen


def _smoothed(one: Priced) -> list[float]:
    """The damages of a matrix's options, in each family alone none below that of one with more bits: a family that is
    bad at many bits says nothing about a better one at fewer."""
    found = [offer.damage for offer in one.offers]
    for family in families([offer.steps for offer in one.offers]):
        rising = monotone([found[number] for number in family], [one.offers[number].bits for number in family])
        for number, value in zip(family, rising, strict=True):
            found[number] = value
    return found


def with_steps(job: Job, found: Choices, chosen: Sequence[int]) -> Recipe:
    """The job's recipe without its target, and with the chosen option of each matrix: a rule for those of equal steps,
    after the rules that were there."""
    groups: dict[Steps, list[str]] = {}
    tables: dict[str, Steps] = {}
    for one, option in zip(found.matrices, chosen, strict=True):
        if one.is_table:
            tables["embeddings" if one.name == job.arch.embedding else "head"] = one.options[option]
        else:
            groups.setdefault(one.options[option], []).append(one.name)
    rules = (*job.recipe.rules, *(Rule(match=tuple(names), steps=steps) for steps, names in groups.items()))
    settled = {"target": None, "options": None, "damage": "distortion"}  # as where there is no target
    return Recipe(**{**dict(job.recipe), **settled, "rules": rules, **tables})
