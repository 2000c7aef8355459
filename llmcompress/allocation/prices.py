"""The price list: the size and the cost in quality of each option of each matrix, on held-out calibration text.

The predicted damage of an option is the relative output error that it leaves times the matrix's sensitivity. The
sensitivity is the KL of the model's predictions per unit of that error, measured by exchanging this one matrix (both
grow with the square of a small change). With `damage: distortion` in the recipe, the sensitivity of one option serves
all options; with `kl`, it is measured for each option that is run; with `noise`, random noise stands for all options,
as in ECoFLaP (arXiv 2310.02998). The sum of damages predicts a plan's damage as long as the errors of different layers
do not add up.

Cost for t probing tokens, c calibration tokens and L linears: c forwards of the linears and their Gram matrices, three
rough encodings of all weights, and L (3 L for kl) half forwards and heads of t tokens. In memory: a block, its moments,
and L (3 L) times t hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from llmcompress.allocation.choices import Choices, Matrix, Steps
from llmcompress.allocation.distortion import (
    between,
    changed,
    error,
    families,
    interpolated,
    noisy,
    rough,
    run_of,
    sampled,
)
from llmcompress.allocation.sensitivity import Probe
from llmcompress.calibration.walk import Block, InputGroup, Progress, walk
from llmcompress.compression.importance import importance_of
from llmcompress.compression.job import Job
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import NumericsError
from llmcompress.methods.layer import Layer, methods, step
from llmcompress.methods.moments import Moments
from llmcompress.recipe.compression import Damage
from llmcompress.runtime.precision import product_dtype
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.nodes import Dense

TOKENS = 8192  # of calibration: enough for a ranking

Reference = list[tuple[dict[int, float], list[float]]]  # for each family: see `_of_reference`


@dataclass(frozen=True)
class Offer:
    """One option of a matrix. `bits` and `bytes`: as stored; `error`: relative, on held-out inputs; `measured`: True if
    the error was measured on this matrix, False if interpolated; `damage`: predicted KL in nats per token."""

    steps: Steps
    bits: int
    bytes: int
    error: float
    measured: bool
    damage: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        return {**vars(self), "steps": [config.model_dump(mode="json") for config in self.steps]}

    @staticmethod
    def from_json(entries: dict[str, Any]) -> Offer:
        """Return the offer that `to_json` wrote."""
        return Offer(**{**entries, "steps": tuple(step(one) for one in entries["steps"])})


@dataclass(frozen=True)
class Priced:
    """A matrix with its offers, in the order of the options. `sensitivity`: KL in nats per token for each unit of
    relative error, measured with a middle option."""

    name: str
    shape: tuple[int, int]
    is_table: bool
    sensitivity: float
    offers: tuple[Offer, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        return {**vars(self), "shape": list(self.shape), "offers": [offer.to_json() for offer in self.offers]}

    @staticmethod
    def from_json(entries: dict[str, Any]) -> Priced:
        """Return the matrix that `to_json` wrote."""
        offers = tuple(Offer.from_json(offer) for offer in entries["offers"])
        return Priced(**{**entries, "shape": tuple(entries["shape"]), "offers": offers})


def damage(price_list: Sequence[Priced], chosen: Sequence[int]) -> float:
    """Return the predicted KL of a plan: the sum over its options."""
    return sum(one.offers[option].damage for one, option in zip(price_list, chosen, strict=True))


@dataclass(frozen=True)
class _Run:
    """The measurements of one matrix, by option: the error of each option that was run; and of those that were probed,
    a `middle` one among them, the number of the change and the error that it made."""

    errors: dict[int, float]
    changes: dict[int, tuple[int, float]]
    middle: int


@dataclass(frozen=True)
class Measured:
    """The measurements of one matrix when its changes have been judged, by option. `probed`: a middle option."""

    errors: dict[int, float]
    sensitivities: dict[int, float]
    probed: int


@dataclass(frozen=True)
class Measurements:
    """The measurements of some matrices, by name, and of the smallest linear if that is among them: for each family of
    options the errors with rough steps, by number, and with their own, in order."""

    matrices: dict[str, Measured]
    reference: Reference

    def to_json(self) -> dict[str, Any]:
        """Return plain values; numbers of options lie in lists, since keys of JSON are text."""
        matrices = {
            name: {"errors": [*one.errors.items()], "sensitivities": [*one.sensitivities.items()], "probed": one.probed}
            for name, one in self.matrices.items()
        }
        return {"matrices": matrices, "reference": [[[*fast.items()], asked] for fast, asked in self.reference]}

    @staticmethod
    def from_json(entries: dict[str, Any]) -> Measurements:
        """Return the inverse of `to_json`. Raises KeyError, TypeError or ValueError for entries of another form."""
        matrices = {
            name: Measured(dict(one["errors"]), dict(one["sensitivities"]), int(one["probed"]))
            for name, one in entries["matrices"].items()
        }
        return Measurements(matrices, [(dict(fast), list(asked)) for fast, asked in entries["reference"]])


def prices(
    job: Job,
    found: Choices,
    tokens: CalibrationTokens,
    probe: Probe,
    device: str,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Priced, ...]:
    """Return the price list of all matrices, in their order. Raises InputError and NumericsError as the walk and
    methods do.

    Statistics are taken from the dense model's inputs, so that no price depends on how other layers are compressed, nor
    on which of several processes measures it: each takes every so many-th block, and its changes to the end.
    """
    with ranks.agree_on_errors():
        mine = measured(job, found, tokens, probe, device, progress, ranks)
    return listed(found, ranks.gather(mine))


def measured(
    job: Job,
    found: Choices,
    tokens: CalibrationTokens,
    probe: Probe,
    device: str,
    progress: Progress | None,
    ranks: Ranks,
) -> Measurements:
    """Return the measurements that are a process's to make; it need not be one of processes that run together."""
    smallest = smallest_of([one for one in found.matrices if not one.is_table])
    wanted = {one.name: one for one in _share(job, found.matrices, ranks)}
    found_by: dict[str, _Run] = {}
    reference: Reference = []
    for block, layer, held_out in _layers(job, wanted, tokens, probe, device, progress):
        one = wanted[layer.name]
        if one is smallest:
            reference = [_of_reference(layer, one, family, held_out) for family in families(one.options)]
        found_by[one.name] = _run(block, layer, one, held_out, probe, job.recipe.damage)
    divergences = probe.divergences()
    return Measurements({name: _judged(name, run, divergences) for name, run in found_by.items()}, reference)


def listed(found: Choices, parts: Iterable[Measurements]) -> tuple[Priced, ...]:
    """Return the price list of all matrices from the measurements of all processes."""
    matrices: dict[str, Measured] = {}
    reference: Reference = []
    for part in parts:
        matrices |= part.matrices
        reference = reference or part.reference
    return tuple(_priced(one, matrices[one.name], [] if one.is_table else reference) for one in found.matrices)


def _share(job: Job, matrices: Sequence[Matrix], ranks: Ranks) -> list[Matrix]:
    """Return the matrices that a process measures: those of every so many-th block, where each table is a block."""
    blocks = [{linear.name for group in block.groups for linear in group} for block in job.arch.blocks]
    blocks += [{one.name} for one in matrices if one.is_table]
    mine = set().union(*blocks[ranks.rank :: ranks.count])
    return [one for one in matrices if one.name in mine]


def smallest_of(linears: list[Matrix]) -> Matrix | None:
    """Return the smallest of some linears, of equal ones that nearest to the middle; None of none."""
    middle = len(linears) // 2
    ranked = [(prod(one.shape), abs(place - middle), place) for place, one in enumerate(linears)]
    return linears[min(ranked)[-1]] if ranked else None


def run_on(one: Matrix) -> list[int]:
    """Return the options that are run on a matrix: a few of each family, all of a table."""
    if one.is_table:
        return [*range(len(one.options))]
    return [number for family in families(one.options) for number in run_of(family)]


def middle_of(one: Matrix) -> int:
    """Return the option that a matrix is probed with: the middle one that is run, of its largest family."""
    largest = run_of(max(families(one.options), key=len))
    return largest[(len(largest) - 1) // 2]


def sequences_of(fitted: int, held_out: int, length: int) -> tuple[int, int]:
    """Return how many of so many sequences options are fitted to, and how many they are judged on."""
    return max(1, min(fitted, TOKENS // length)), max(1, min(held_out, TOKENS // 4 // length))


def _layers(
    job: Job,
    wanted: dict[str, Matrix],
    tokens: CalibrationTokens,
    probe: Probe,
    device: str,
    progress: Progress | None,
) -> Iterator[tuple[Block, Layer, Moments | None]]:
    """Yield every wanted matrix as methods see it, in its block and with the moments of its held-out inputs; the probe
    moves on with the walk."""
    first = tokens.obtained - tokens.held_out
    fitted, held_out = sequences_of(first, tokens.held_out, tokens.length)
    sequences = torch.cat([tokens.sequences[:fitted], tokens.sequences[first : first + held_out]])
    recipe = job.recipe
    blocks = walk(
        job.source,
        job.arch,
        sequences,
        held_out=held_out,
        needs=needs_of(job, wanted),
        cap=recipe.cap,
        weights=recipe.token_weights,
        importance=importance_of(job, sequences, torch.device(device)),
        prefix="dense",
        device=device,
        dtype=product_dtype(recipe.compute, torch.device(device)),
        progress=progress,
    )
    for block in blocks:
        for group in block.groups:
            for name in (name for name in group.names if name in wanted):
                weight = block.weight(name)
                start, rows = Dense(weight.to(torch.bfloat16)), group.rows.get(name)
                layer = Layer(name, weight, start, group.inputs, _seed(job, group), rows=rows)
                yield block, layer, group.held_out
            group.inputs.derived.clear()
        probe.leave(block)


def _seed(job: Job, group: InputGroup) -> str:
    return f"{job.recipe.seed}/{group.names[0]}"


def needs_of(job: Job, wanted: dict[str, Matrix]) -> dict[str, frozenset[str]]:
    """Return the statistics that the options of each matrix read, and those that its errors are computed from."""
    known = methods()
    only_looked_up = None if job.arch.tied else job.arch.embedding
    return {
        name: frozenset(() if name == only_looked_up else {"outer"}).union(
            *(known[config.method].needs for steps in one.options for config in steps)
        )
        for name, one in wanted.items()
    }


def _of_reference(
    layer: Layer, one: Matrix, family: list[int], held_out: Moments | None
) -> tuple[dict[int, float], list[float]]:
    """Return the errors of a family's options on the reference layer: with rough steps, by number, and with their own
    steps, in order."""
    fast = {number: error(layer, rough(one.options[number]), held_out) for number in run_of(family)}
    return fast, [error(layer, one.options[number], held_out) for number in family]


def _run(block: Block, layer: Layer, one: Matrix, held_out: Moments | None, probe: Probe, by: Damage) -> _Run:
    """Run a few options of a linear roughly, or all options of a table on some of its rows. Probe with a middle one,
    by `kl` with each that is run, by `noise` with noise."""
    rows = sampled(layer, one.is_table)
    middle = middle_of(one)
    errors, changes = {}, {}
    for number in run_on(one):
        fast, probed = rough(one.options[number]), by == "kl" or number == middle
        if probed:
            value, made = noisy(layer, held_out) if by == "noise" else changed(layer, fast, held_out)
            changes[number] = probe.exchange(block, layer.name, value), made
        alone = one.is_table or all(config.rowwise for config in fast)  # do some rows tell of all?
        tried = rows if alone else layer
        exact = probed and by != "noise" and tried is layer and not one.is_table
        errors[number] = made if exact else error(tried, one.options[number] if one.is_table else fast, held_out)
    _check_finite(layer.name, errors.values())
    return _Run(errors, changes, middle)


def _judged(name: str, run: _Run, divergences: list[float]) -> Measured:
    """Return the sensitivities, from the KL of all changes."""
    sensitivities = {
        number: max(divergences[change], 0.0) / made  # rounding can make no change a negative one
        for number, (change, made) in run.changes.items()
    }
    _check_finite(name, sensitivities.values())
    return Measured(run.errors, sensitivities, run.middle)


def _check_finite(name: str, values: Iterable[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise NumericsError(f"{name}: an option for it gives NaN or Inf; give other options, or a rule for it")


def _priced(one: Matrix, found: Measured, reference: Reference) -> Priced:
    errors, kin = dict(found.errors), families(one.options)
    for family, (fast, asked) in zip(kin, reference):
        places = {number: place for place, number in enumerate(family)}
        run = {places[number]: found.errors[number] for number in fast}
        values = interpolated(run, {places[number]: value for number, value in fast.items()}, asked)
        errors |= {number: values[place] for number, place in places.items()}
    damages: dict[int, float] = {}
    for family in kin:
        measured = {number: found.sensitivities[number] for number in family if number in found.sensitivities}
        curve = {errors[number]: value for number, value in (measured or found.sensitivities).items()}
        damages |= {number: errors[number] * between(curve.items(), errors[number]) for number in family}
    offers = tuple(
        Offer(
            steps,
            one.bits[number],
            one.bytes[number],
            errors[number],
            number in found.errors,
            damages[number],
        )
        for number, steps in enumerate(one.options)
    )
    return Priced(one.name, one.shape, one.is_table, found.sensitivities[found.probed], offers)
