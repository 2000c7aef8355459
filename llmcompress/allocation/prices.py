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

import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from llmcompress.allocation.choices import Choices, Matrix, Steps
from llmcompress.allocation.distortion import (
    add_noise,
    compress_roughly,
    error,
    families,
    interpolate_errors,
    interpolate_logarithms,
    is_slow,
    options_to_measure,
    rough,
    sample_few_rows,
    sample_rows,
)
from llmcompress.allocation.sensitivity import Probe, settle_sensitivities
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Block, Execution, Progress, walk
from llmcompress.compression.job import Job, gradient_importance
from llmcompress.compression.time_estimate import EXPERT
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import NumericsError, list_names
from llmcompress.methods.layer import Layer, methods, step
from llmcompress.methods.moments import Moments
from llmcompress.recipe.compression import Damage
from llmcompress.runtime.precision import product_dtype
from llmcompress.runtime.progress import count_steps
from llmcompress.runtime.ranks import Ranks
from llmcompress.weight.nodes import Dense

LOG = logging.getLogger("llmcompress")
TOKENS = 8192  # of calibration: enough for a ranking

Reference = list[tuple[dict[int, float], list[float]]]  # for each family: see `_reference_errors`


@dataclass(frozen=True)
class OptionPrice:
    """The price of one option of a matrix.

    `bits` and `bytes`: as stored. `error`: relative, on held-out inputs. `measured`: True if the error was measured on
    this matrix, False if interpolated. `damage`: predicted KL in nats per token.
    """

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
    def from_json(entries: dict[str, Any]) -> OptionPrice:
        """Return the inverse of `to_json`."""
        return OptionPrice(**{**entries, "steps": tuple(step(config) for config in entries["steps"])})


@dataclass(frozen=True)
class MatrixPrices:
    """The prices of a matrix's options, in their order.

    `sensitivity`: KL in nats per token for each unit of relative error, measured with a middle option.
    """

    name: str
    shape: tuple[int, int]
    is_table: bool
    sensitivity: float
    offers: tuple[OptionPrice, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        return {**vars(self), "shape": list(self.shape), "offers": [offer.to_json() for offer in self.offers]}

    @staticmethod
    def from_json(entries: dict[str, Any]) -> MatrixPrices:
        """Return the inverse of `to_json`."""
        offers = tuple(OptionPrice.from_json(offer) for offer in entries["offers"])
        return MatrixPrices(**{**entries, "shape": tuple(entries["shape"]), "offers": offers})


def damage(price_list: Sequence[MatrixPrices], chosen: Sequence[int]) -> float:
    """Return the predicted KL of a plan: the sum over its options."""
    return sum(matrix.offers[option].damage for matrix, option in zip(price_list, chosen, strict=True))


@dataclass(frozen=True)
class MatrixMeasurement:
    """The measurements of one matrix, by option: errors and sensitivities. `probed`: the middle option."""

    errors: dict[int, float]
    sensitivities: dict[int, float]
    probed: int


@dataclass(frozen=True)
class Measurements:
    """The measurements of some matrices by name; `references`: of those that are the smallest with their options."""

    matrices: dict[str, MatrixMeasurement]
    references: dict[str, Reference]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; numbers of options lie in lists, since keys of JSON are text."""
        matrices = {
            name: {
                "errors": [*each.errors.items()],
                "sensitivities": [*each.sensitivities.items()],
                "probed": each.probed,
            }
            for name, each in self.matrices.items()
        }
        references = {
            name: [[[*fast.items()], own] for fast, own in reference] for name, reference in self.references.items()
        }
        return {"matrices": matrices, "references": references}

    @staticmethod
    def from_json(entries: dict[str, Any]) -> Measurements:
        """Return the inverse of `to_json`. Raises KeyError, TypeError or ValueError for entries of another form."""
        matrices = {
            name: MatrixMeasurement(dict(each["errors"]), dict(each["sensitivities"]), int(each["probed"]))
            for name, each in entries["matrices"].items()
        }
        references = {
            name: [(dict(fast), list(own)) for fast, own in reference]
            for name, reference in entries["references"].items()
        }
        return Measurements(matrices, references)


def measure_matrices(
    job: Job,
    choices: Choices,
    tokens: CalibrationTokens,
    probe: Probe,
    device: str,
    progress: Progress | None,
    ranks: Ranks,
) -> Measurements:
    """Return the measurements of a process's share; other processes need not run at the same time.

    Statistics are taken from the dense model's inputs, so no price depends on how other layers are compressed, nor on
    which process measures it: each takes every so many-th block, and its changes to the end. Raises InputError and
    NumericsError as the walk and methods do.
    """
    smallest = {matrix.name for matrix in smallest_matrices(choices.matrices).values()}
    wanted = {matrix.name: matrix for matrix in _own_matrices(job, choices.matrices, ranks)}
    errors: dict[str, dict[int, float]] = {}
    changes: dict[str, dict[int, tuple[int, float]]] = {}
    references: dict[str, Reference] = {}
    step = count_steps("matrix priced", len(wanted))
    for block, layer, held_out in _layers(job, wanted, tokens, probe, device, progress):
        matrix = wanted[layer.name]
        if matrix.name in smallest:
            references[matrix.name] = [
                _reference_errors(layer, matrix, family, held_out) for family in families(matrix.options)
            ]
        results = _run_options(block, layer, matrix, held_out, probe, job.recipe.damage)
        errors[matrix.name], changes[matrix.name] = results
        del layer, held_out  # else the moments of a block stay beside the next one's
        step()
    divergences = probe.divergences()
    measurements = {}
    for name, own in errors.items():
        sensitivities = {
            number: max(divergences[change], 0.0) / made  # rounding can make no change a negative one
            for number, (change, made) in changes[name].items()
        }
        _check_finite(name, sensitivities.values())
        measurements[name] = MatrixMeasurement(own, sensitivities, middle_option(wanted[name]))
    return Measurements(measurements, references)


def prices_of(choices: Choices, parts: Iterable[Measurements]) -> tuple[MatrixPrices, ...]:
    """Return the price list of all matrices from the measurements of all processes."""
    matrices: dict[str, MatrixMeasurement] = {}
    references: dict[str, Reference] = {}
    for part in parts:
        matrices |= part.matrices
        references |= part.references
    smallest, prices = smallest_matrices(choices.matrices), []
    sensitivities = settle_sensitivities({name: each.sensitivities for name, each in matrices.items()})
    for matrix in choices.matrices:
        reference = [] if matrix.is_table else references[smallest[matrix.options].name]
        prices.append(_price_options(matrix, matrices[matrix.name], sensitivities[matrix.name], reference))
    for note in note_unreached(prices):
        LOG.warning(note)
    return tuple(prices)


def note_unreached(price_list: Sequence[MatrixPrices]) -> tuple[str, ...]:
    """Return a note on experts that no probing token reaches; none if all are reached."""
    names = [matrix.name for matrix in price_list if not matrix.sensitivity and EXPERT.fullmatch(matrix.name)]
    note = f"{list_names(names)}: no probing token tells of it, so it counts as the least sensitive other expert does"
    return (note,) if names else ()


def _own_matrices(job: Job, matrices: Sequence[Matrix], ranks: Ranks) -> list[Matrix]:
    """Return the matrices that a process measures: those of every so many-th block; each table counts as a block."""
    blocks = [{linear.name for group in block.groups for linear in group} for block in job.arch.blocks]
    blocks += [{matrix.name} for matrix in matrices if matrix.is_table]
    own = set().union(*blocks[ranks.rank :: ranks.count])
    return [matrix for matrix in matrices if matrix.name in own]


def smallest_matrices(matrices: Sequence[Matrix]) -> dict[tuple[Steps, ...], Matrix]:
    """Return by options the smallest linear that has them, of equal ones the one nearest to the middle."""
    by_options: dict[tuple[Steps, ...], list[Matrix]] = {}
    for matrix in (matrix for matrix in matrices if not matrix.is_table):
        by_options.setdefault(matrix.options, []).append(matrix)
    return {options: _smallest(linears) for options, linears in by_options.items()}


def _smallest(linears: list[Matrix]) -> Matrix:
    middle = len(linears) // 2
    ranked = [(prod(linear.shape), abs(place - middle), place) for place, linear in enumerate(linears)]
    return linears[min(ranked)[-1]]


def options_to_run(matrix: Matrix) -> list[int]:
    """Return the options that are run on a matrix: a few of each family, all of a table."""
    if matrix.is_table:
        return [*range(len(matrix.options))]
    return [number for family in families(matrix.options) for number in options_to_measure(family)]


def middle_option(matrix: Matrix) -> int:
    """Return the option that a matrix is probed with: the middle one that is run, of its largest family."""
    largest = options_to_measure(max(families(matrix.options), key=len))
    return largest[(len(largest) - 1) // 2]


def probed_options(matrix: Matrix, by: Damage) -> list[int]:
    """Return the options that the predictions are measured with: a middle one, by `kl` all that are run.

    Of a table also the cheapest, since tables may be most of a model and change it much.
    """
    if by == "kl":
        return options_to_run(matrix)
    cheapest = {matrix.bytes.index(min(matrix.bytes))} if matrix.is_table and by != "noise" else set()
    return sorted({middle_option(matrix), *cheapest})


def sequence_counts(fitted: int, held_out: int, length: int) -> tuple[int, int]:
    """Return how many of so many sequences options are fitted to, and how many they are judged on."""
    return max(1, min(fitted, TOKENS // length)), max(1, min(held_out, TOKENS // 4 // length))


def _layers(
    job: Job,
    wanted: Mapping[str, Matrix],
    tokens: CalibrationTokens,
    probe: Probe,
    device: str,
    progress: Progress | None,
) -> Iterator[tuple[Block, Layer, Moments | None]]:
    """Yield every wanted matrix as methods see it, with its block and the moments of its held-out inputs.

    The probe moves on with the walk.
    """
    first = tokens.obtained - tokens.held_out
    fitted, held_out = sequence_counts(first, tokens.held_out, tokens.length)
    sequences = torch.cat([tokens.sequences[:fitted], tokens.sequences[first : first + held_out]])
    recipe, place = job.recipe, torch.device(device)
    importance = gradient_importance(job, sequences, place)
    needs = statistics_needs(job, wanted)
    statistics = Statistics(needs, recipe.cap, recipe.token_weights, importance, prefix="dense")
    execution = Execution(device, product_dtype(recipe.compute, place), progress=progress)
    for block in walk(job.source, job.arch, sequences, statistics, execution, held_out=held_out):
        yield from _layers_of(block, wanted, recipe.seed)
        probe.leave(block)


def _layers_of(block: Block, wanted: Container[str], seed: int) -> Iterator[tuple[Block, Layer, Moments | None]]:
    """Yield as `_layers` does; at its end it holds no moments, which the next block's would lie beside."""
    for group in block.groups:
        for name in (name for name in group.names if name in wanted):
            weight, drawn = block.weight(name), f"{seed}/{group.names[0]}"
            layer = Layer(name, weight, Dense(weight), group.inputs, drawn, rows=group.rows.get(name))
            yield block, layer, group.held_out
        group.inputs.derived.clear()


def statistics_needs(job: Job, wanted: Mapping[str, Matrix]) -> dict[str, frozenset[str]]:
    """Return the statistics that the options of each matrix read and that its errors need, by name.

    A table that is only looked up has no inputs, as in the run itself.
    """
    known = methods()
    needs = {
        name: frozenset({"outer"}).union(*(known[config.method].needs for steps in matrix.options for config in steps))
        for name, matrix in wanted.items()
    }
    return {name: frozenset() if name == job.arch.only_looked_up else each for name, each in needs.items()}


def _reference_errors(
    layer: Layer, matrix: Matrix, family: list[int], held_out: Moments | None
) -> tuple[dict[int, float], list[float]]:
    """Return the errors of a family's options on the reference layer.

    Those with rough steps by number, and those with their own steps in order.
    """
    if any(is_slow(matrix.options[number]) for number in family):
        layer = sample_few_rows(layer)
    fast = {number: error(layer, rough(matrix.options[number]), held_out) for number in options_to_measure(family)}
    return fast, [error(layer, matrix.options[number], held_out) for number in family]


def _run_options(
    block: Block, layer: Layer, matrix: Matrix, held_out: Moments | None, probe: Probe, by: Damage
) -> tuple[dict[int, float], dict[int, tuple[int, float]]]:
    """Run a few options of a linear roughly, or all options of a table on some of its rows.

    Probes with the `probed_options`, by `noise` with noise. Returns the error of each option; and of those that were
    probed, the number of the change and the error that it made.
    """
    rows, few = sample_rows(layer, matrix.is_table), sample_few_rows(layer)
    probed = probed_options(matrix, by)
    errors, changes = {}, {}
    for number in options_to_run(matrix):
        fast, is_probed = rough(matrix.options[number]), number in probed
        if is_probed:
            change = add_noise(layer, held_out) if by == "noise" else compress_roughly(layer, fast, held_out)
            if matrix.is_table:  # may be most of a model, which is read beside it
                change = change._replace(weight=change.weight.to(torch.bfloat16))
            changes[number] = probe.exchange(block, layer.name, change.weight), change.error
        rowwise = matrix.is_table or all(config.rowwise for config in fast)
        target = few if is_slow(fast) else rows if rowwise else layer  # some rows tell of all
        if is_probed and by != "noise" and target is layer and not matrix.is_table:
            errors[number] = change.error
        else:
            errors[number] = error(target, matrix.options[number] if matrix.is_table else fast, held_out)
    _check_finite(layer.name, errors.values())
    return errors, changes


def _check_finite(name: str, values: Iterable[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise NumericsError(f"{name}: an option for it gives NaN or Inf; give other options, or a rule for it")


def _price_options(
    matrix: Matrix, measurement: MatrixMeasurement, sensitivities: Mapping[int, float], reference: Reference
) -> MatrixPrices:
    errors, kin = dict(measurement.errors), families(matrix.options)
    for family, (fast, own) in zip(kin, reference):
        places = {number: place for place, number in enumerate(family)}
        run = {places[number]: measurement.errors[number] for number in fast}
        values = interpolate_errors(run, {places[number]: value for number, value in fast.items()}, own)
        errors |= {number: values[place] for number, place in places.items()}
    damages: dict[int, float] = {}
    for family in kin:
        probed = {number: value for number, value in sensitivities.items() if number in family}
        curve = {errors[number]: value for number, value in (probed or sensitivities).items()}
        damages |= {n: errors[n] * interpolate_logarithms(curve.items(), errors[n]) for n in family}
    offers = tuple(
        OptionPrice(steps, matrix.bits[n], matrix.bytes[n], errors[n], n in measurement.errors, damages[n])
        for n, steps in enumerate(matrix.options)
    )
    return MatrixPrices(
        matrix.name, matrix.shape, matrix.is_table, measurement.sensitivities[measurement.probed], offers
    )
