"""Options for each matrix of a model, and their sizes: the options of a recipe with a target, laid over the model.

The recipe's rules come first; options are for matrices that no rule covers. If the target is in bytes or a quality,
the token table and the output head have options too, unless the recipe gives their steps. A target in bits per weight
or in zeros counts the decoder's linears alone. A target for an engine has options that it multiplies, and for tables
those that it reads, if any.

Sizes are those of `file_sizes.py`: of our weight files, or of an engine's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llmcompress.allocation.distortion import Steps
from llmcompress.allocation.file_sizes import FileSizes, file_sizes
from llmcompress.allocation.target_formats import (
    ENGINE_OBSTACLES,
    check_rules,
    check_source,
    engine_table_options,
    options_for,
)
from llmcompress.compression.job import Job
from llmcompress.errors import RecipeError, list_names
from llmcompress.methods.layer import sketch, step
from llmcompress.methods.solvers.sparsity import kept_count
from llmcompress.recipe.target import Target
from llmcompress.weight.expression import not_zero
from llmcompress.weight.rows import check_rows

RATES = (1, 1.5, 2, 2.5, 3, 4)  # of trellises, in bits a weight: the default options of linears
LOW_RATES = (0.5, 0.65, 0.8)  # of binary factors, in bits a weight: more of them where a target is low
LOW = 1.25  # bits a weight: a target is low below it
TABLE_RATES = (2, 2.5, 3, 3.5, 4)  # of trellises, in bits a weight: options of tables, which may be most of a model
WIDTHS = (4, 5, 6, 8)  # of grids, in bits: their other options
AROUND = (-0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2)  # a target's sparsity: that of the default options
MOST_ZEROS = 0.98  # of a default option
TABLE_GROUP = 64  # columns that share a scale in a table that is only looked up


@dataclass(frozen=True)
class Matrix:
    """A linear or a table with options. By option, `bits`: as stored; `bytes`: of the payload; `nonzero`: weights that
    are not pruned."""

    name: str
    shape: tuple[int, int]
    options: tuple[Steps, ...]
    bits: tuple[int, ...]
    bytes: tuple[int, ...]
    nonzero: tuple[int, ...]
    is_table: bool = False

    def costs(self, target: Target) -> tuple[int, ...]:
        """Return the cost of each option in the unit of a target: bits, nonzero weights or bytes."""
        if target.bpw is not None:
            return self.bits
        return self.bytes if target.sparsity is None else self.nonzero


@dataclass(frozen=True)
class Choices:
    """All matrices with options, and the sizes that no choice changes.

    `fixed_bits`, `fixed_weights`, `fixed_nonzero`: of the linears that a rule compresses. `fixed_bytes`: of the weight
    files without the payloads of the matrices. `notes`: about options that do not suit a matrix. `bundles`: numbers of
    matrices that take one option together; all others choose alone.
    """

    matrices: tuple[Matrix, ...]
    fixed_bits: int
    fixed_weights: int
    fixed_nonzero: int
    fixed_bytes: int
    notes: tuple[str, ...] = ()
    bundles: tuple[tuple[int, ...], ...] = ()

    def together(self) -> tuple[tuple[int, ...], ...]:
        """Return the numbers of all matrices, those that take one option in one tuple, in order."""
        bundled = {number for bundle in self.bundles for number in bundle}
        alone = ((number,) for number in range(len(self.matrices)) if number not in bundled)
        return tuple(sorted((*self.bundles, *alone)))

    def add_rows(self, table: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return a table by matrix and option with one row, the sum, for matrices that take one option."""
        return [[sum(column) for column in zip(*(table[n] for n in each), strict=True)] for each in self.together()]

    def expand(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Return the option of each matrix from those of the rows of `add_rows`."""
        own = {n: option for each, option in zip(self.together(), chosen, strict=True) for n in each}
        return tuple(own[number] for number in range(len(self.matrices)))

    def cheapest(self, costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
        """Return the option of each matrix with the least cost, by matrix and option."""
        return self.expand([row.index(min(row)) for row in self.add_rows(costs)])

    def size(self, chosen: Sequence[int]) -> int:
        """Return the bytes of the weight files with the option `chosen` of each matrix, at most a few too many."""
        return self.fixed_bytes + sum(matrix.bytes[n] for matrix, n in zip(self.matrices, chosen, strict=True))

    @property
    def weights(self) -> int:
        """The number of weights of the compressed linears."""
        return self.fixed_weights + sum(prod(matrix.shape) for matrix in self.matrices if not matrix.is_table)

    def bits(self, chosen: Sequence[int]) -> int:
        """Return the stored bits of the compressed linears with the option `chosen` of each matrix."""
        pairs = zip(self.matrices, chosen, strict=True)
        return self.fixed_bits + sum(matrix.bits[n] for matrix, n in pairs if not matrix.is_table)

    def bpw(self, chosen: Sequence[int]) -> float | None:
        """Return the bits per weight of the compressed linears, as a report counts them; None if there are none."""
        return self.bits(chosen) / self.weights if self.weights else None

    def room(self, target: Target) -> float:
        """Return the largest sum of `Matrix.costs` that meets a size or a share of zeros."""
        if target.bpw is not None:
            return target.bpw * self.weights - self.fixed_bits
        if target.sparsity is not None:
            return kept_count(self.weights, target.sparsity) - self.fixed_nonzero
        return math.inf if target.bytes is None else target.bytes - self.fixed_bytes

    def nonzero(self, chosen: Sequence[int]) -> int:
        """Return how many weights of the compressed linears are not pruned with the option `chosen` of each matrix."""
        pairs = zip(self.matrices, chosen, strict=True)
        return self.fixed_nonzero + sum(matrix.nonzero[n] for matrix, n in pairs if not matrix.is_table)

    def sparsity(self, chosen: Sequence[int]) -> float | None:
        """Return the share of pruned weights in the compressed linears; None if there are none."""
        return 1 - self.nonzero(chosen) / self.weights if self.weights else None


def find_choices(job: Job) -> Choices:
    """Return what the job's recipe leaves to choose.

    Raises RecipeError if its rules leave nothing, or if no option suits a matrix.
    """
    return _lay_options(job, _options(job))


def goes_low(job: Job) -> bool:
    """True if linears have options of less than a bit by default, since the target leaves them less than LOW bits.

    A target in bytes is low if it leaves less room than that above the cheapest of the other options.
    """
    recipe = job.recipe
    if recipe.options is not None or recipe.target is None or recipe.target.kl is not None:
        return False
    if recipe.target.other_engine is not None or recipe.target.sparsity is not None:  # have options of their own
        return False
    if recipe.target.bpw is not None:
        return recipe.target.bpw < LOW
    choices = _lay_options(job, _default_options())
    least = choices.size(choices.cheapest([matrix.bytes for matrix in choices.matrices]))
    weights = sum(prod(matrix.shape) for matrix in choices.matrices if not matrix.is_table)
    return 8 * ((recipe.target.bytes or 0) - least) < (LOW - min(RATES)) * weights


def _options(job: Job) -> Sequence[Steps]:
    """Return the options of linears: those of the recipe, or the default ones that suit all of them."""
    if job.recipe.options is not None:
        return job.recipe.options
    if job.recipe.target is not None and job.recipe.target.sparsity is not None:
        return _sparse_options(job.recipe.target.sparsity)
    shapes = {job.arch.linears()[name].shape for name in job.assignment.unruled}
    low = [(step({"method": "binary_low_rank", "bits": rate}),) for rate in LOW_RATES] if goes_low(job) else []
    engine = None if job.recipe.target is None else job.recipe.target.engine
    return (*(steps for steps in low if all(_suits(shape, steps, engine) for shape in shapes)), *_default_options())


def _suits(shape: tuple[int, int], steps: Steps, engine: str | None = None) -> bool:
    """True if the steps can store a matrix of this shape, and an engine multiplies by it."""
    try:
        stored = sketch("", shape, steps)
    except RecipeError:
        return False
    return engine is None or ENGINE_OBSTACLES[engine](stored) is None


def _lay_options(job: Job, options: Sequence[Steps]) -> Choices:
    """Return the options laid over the matrices that no rule covers. Raises RecipeError as `find_choices`."""
    recipe, linears = job.recipe, job.arch.linears()
    engine = None if recipe.target is None else recipe.target.engine
    other = None if recipe.target is None else recipe.target.other_engine
    sizes = file_sizes(job)
    notes: tuple[str, ...] = ()
    open_linears = [linears[name] for name in job.assignment.unruled]
    suited: dict[str, Sequence[Steps]] = {}
    if other is None:
        suited, notes = _suitable_options({it.name: it.shape for it in open_linears}, options)
    if engine is not None:
        check_rules(job, engine)
        check_source(job, engine)
        suited = {it.name: options_for(engine, it, suited.get(it.name, recipe.options)) for it in open_linears}
    matrices = [_matrix(sizes, it.name, it.shape, suited[it.name]) for it in open_linears]
    if recipe.target is not None and recipe.target.with_tables:
        for name, each in _tables(job).items():
            own, more = _suitable_options({name: _shape(job, name)}, each)
            matrices.append(_matrix(sizes, name, _shape(job, name), own[name], True))
            notes += more
    numbers = {matrix.name: number for number, matrix in enumerate(matrices)}
    stacked = [names for block in job.arch.blocks for names in block.siblings()] if engine == "vllm" else []
    if not matrices:
        raise RecipeError(
            f"the rules of recipe {recipe.name!r} cover every layer of {job.source.name}, so none is left to choose "
            f"steps for; drop the target, or the rule that matches all"
        )
    shapes = {name: linears[name].shape for name in job.steps} | {name: _shape(job, name) for name in job.tables}
    compressed = {*shapes, *(matrix.name for matrix in matrices)}
    return Choices(
        tuple(matrices),
        sum(sizes.bits(name, shapes[name], steps) for name, steps in job.steps.items()),
        sum(prod(shapes[name]) for name in job.steps),
        sum(not_zero(sketch(name, shapes[name], steps)) for name, steps in job.steps.items()),
        sizes.around(compressed) + sum(sizes.bytes(name, shapes[name], each) for name, each in job.all_steps.items()),
        notes,
        tuple(tuple(numbers[name] for name in names) for names in stacked if names[0] in numbers),
    )


def _suitable_options(
    shapes: Mapping[str, tuple[int, int]], options: Sequence[Steps]
) -> tuple[dict[str, Sequence[Steps]], tuple[str, ...]]:
    """Return the options that can store each matrix, by its name, and a note if some cannot.

    Raises RecipeError for a matrix that none suits.
    """
    by_shape = {shape: [steps for steps in options if _suits(shape, steps)] for shape in set(shapes.values())}
    for name, shape in shapes.items():
        if not by_shape[shape]:
            sketch(name, shape, options[0])  # raises what is wrong with the first
    fewer = [name for name, shape in shapes.items() if len(by_shape[shape]) < len(options)]
    note = f"options: {list_names(fewer)} cannot be stored by all of them, and have only those that suit their shape"
    return {name: by_shape[shape] for name, shape in shapes.items()}, (note,) if fewer else ()


def _default_options() -> tuple[Steps, ...]:
    """Return the default options of linears: trellises in a rotated basis, with one `refine`."""
    return tuple(_steps(_trellis(rate), {"method": "refine", "passes": 1}) for rate in RATES)


def _trellis(rate: float) -> dict[str, Any]:
    """Return the arguments of a trellis whose numbers processors look up fast, and whose columns are rings."""
    return {"method": "trellis", "bits": rate, "run": 384, "code": "linear", "ring": True}


def _sparse_options(sparsity: float) -> tuple[Steps, ...]:
    """Return the default options for a share of zeros: SparseGPT around it, with one `refine` of the other weights."""
    shares = sorted({min(max(round(sparsity + more, 4), 0.0), max(sparsity, MOST_ZEROS)) for more in AROUND})
    each = ({"method": "sparsegpt", "sparsity": share} for share in shares)
    return tuple((step(pruning), step({"method": "refine", "passes": 1})) for pruning in each)


def _steps(*arguments: dict[str, Any]) -> Steps:
    return tuple(step(config) for config in ({"method": "rotate"}, *arguments))


def _tables(job: Job) -> dict[str, Sequence[Steps]]:
    """Return the options of the token table and an untied output head that the recipe gives no steps for."""
    arch, recipe = job.arch, job.recipe
    engine = None if recipe.target is None else recipe.target.other_engine
    options: dict[str, Sequence[Steps]] = {}
    if not recipe.embeddings and (arch.tied or recipe.table is None) and job.has_plain_table:
        options[arch.embedding] = table_options(engine, _shape(job, arch.embedding), only_looked_up=not arch.tied)
    plain_head = not arch.tied and not arch.casts_to_head and f"{arch.head}.weight" in job.source.tensors
    if recipe.head is None and plain_head:
        options[arch.head] = table_options(engine, _shape(job, arch.head), only_looked_up=False)
    return {
        name: each for name, each in options.items() if each and name not in job.tables and not recipe.keeps_dense(name)
    }


def table_options(engine: str | None, size: tuple[int, int], only_looked_up: bool) -> Sequence[Steps]:
    """Return the options of a table `[rows, width]` for an engine, or for llmcompress itself; none where it stays."""
    if engine is not None:
        return engine_table_options(engine, size, only_looked_up)
    trellises = tuple(_steps(_trellis(rate)) for rate in TABLE_RATES)
    plain = {"method": "rtn", "group_size": TABLE_GROUP, "symmetric": False}
    looked_up = tuple((step(plain | {"bits": width}),) for width in WIDTHS)
    grids = tuple(_steps({"method": "gptq", "bits": width}) for width in WIDTHS)
    return (*trellises, *(looked_up if only_looked_up else grids))


def _shape(job: Job, name: str) -> tuple[int, int]:
    rows, width = job.source.tensors[f"{name}.weight"].shape
    return rows, width


def _matrix(
    sizes: FileSizes, name: str, shape: tuple[int, int], options: Sequence[Steps], is_table: bool = False
) -> Matrix:
    stored = [sketch(name, shape, steps) for steps in options]
    if is_table:
        for weight in stored:
            check_rows(weight)
    costs = [(sizes.bits(name, shape, steps), sizes.bytes(name, shape, steps)) for steps in options]
    each_bits, each_bytes = zip(*costs, strict=True)
    return Matrix(name, shape, tuple(options), each_bits, each_bytes, tuple(map(not_zero, stored)), is_table)
