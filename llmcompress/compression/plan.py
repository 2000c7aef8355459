"""The plan of a job, from config and tensor headers alone, and warnings before a run.

A run checks itself by its plan, so it does exactly what `plan` prints. Bits are counted on the expression that each
step announces for the layer's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from itertools import takewhile
from math import prod
from typing import Any

from pydantic import BaseModel

from llmcompress.compression.job import Job
from llmcompress.compression.layers import describe_rounded
from llmcompress.compression.memory_estimate import peak_bytes
from llmcompress.errors import MemoryLimitError, RecipeError, list_names
from llmcompress.methods.layer import StepConfig, base_and_term, methods, sketch
from llmcompress.methods.low_rank.factors import LQER, SVD, EoRA
from llmcompress.models.dense.skeleton import is_causal
from llmcompress.recipe.rules import matches
from llmcompress.reporting.report import UNGATED
from llmcompress.runtime.memory import total_memory
from llmcompress.weight.algebra import add_term
from llmcompress.weight.expression import bits, describe
from llmcompress.weight.nodes import LowRank, Weight
from llmcompress.weight.rows import check_rows

TABLE_HINT = "; --set '"  # precedes a setting that compresses tables, in a warning
DENSE_SHARE = 0.25  # of the weight files: a larger share that stays dense is worth a warning


@dataclass(frozen=True)
class LayerPlan:
    """The steps of one linear and what they store."""

    name: str
    shape: tuple[int, int]  # (out, in)
    steps: tuple[str, ...]
    bits: int
    bpw: float
    description: str


@dataclass(frozen=True)
class TimeEstimate:
    """The time of a run on this machine when it is quiet.

    `product_speed`: operations a second of products, in the dtype of the recipe, which the seconds assume.
    """

    seconds: float
    product_speed: float


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `bytes`: of the weights on disk. `peak_memory_bytes`: an estimate for this machine, of each
    process."""

    model: str
    recipe: str
    layers: tuple[LayerPlan, ...]
    bytes: int
    dense_bytes: int
    bpw: float
    model_bpw: float
    peak_memory_bytes: int
    warnings: tuple[str, ...]
    reconstruction: dict[str, Any] | None = None  # the section `reconstruct:` with every value
    distillation: dict[str, Any] | None = None  # the section `distill:` with every value
    target: dict[str, Any] | None = None  # of a recipe whose steps `compress` chooses: `layers` spends its bits evenly
    timed: Callable[[], TimeEstimate] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def time(self) -> TimeEstimate | None:
        """The time of the run, from trials that take seconds; None in a run."""
        return None if self.timed is None else self.timed()

    @property
    def seconds(self) -> float | None:
        """The seconds of `time`."""
        return None if self.time is None else self.time.seconds

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields, and `seconds` and `product_speed` of `time`."""
        values = asdict(replace(self, timed=None))
        del values["timed"]
        return values | (dict.fromkeys(("seconds", "product_speed")) if self.time is None else vars(self.time))


def plan_of(job: Job, processes: int = 1) -> Plan:
    """Plan the job, which some `processes` share. Raises RecipeError for a target, and if a step cannot work on a
    layer's shape."""
    if job.recipe.target is not None:
        raise RecipeError(
            "the steps for a target are chosen first; choose them, or take the recipe that compress leaves"
        )
    linears = job.arch.linears()
    rows: list[LayerPlan] = []
    alike: dict[tuple[tuple[int, int], str, bool], LayerPlan] = {}  # a large model has few shapes
    for name, steps in job.steps.items():
        size, tie, inputs = linears[name].shape, job.ties.get(name), job.inputs.get(name)
        terms = added_terms(job, name, size)
        key = size, repr((steps, inputs, [describe(term) for term in terms])), tie is not None and tie.is_first(name)
        if key not in alike:
            stored = reduce(add_term, terms, tie.sketch(name) if tie else sketch(name, size, steps))
            text = tie.description(name, stored) if tie else describe_rounded(stored, inputs)
            alike[key] = _row(name, size, steps, stored, text)
        rows.append(replace(alike[key], name=name))
    if not rows:
        raise RecipeError(
            f"recipe {job.recipe.name!r} compresses no layer of {job.source.name}; give a rule with steps"
        )
    weights = sum(prod(row.shape) for row in rows)
    stored_bits = sum(row.bits for row in rows)
    for name, steps in job.tables.items():
        shape = job.source.tensors[f"{name}.weight"].shape
        stored = sketch(name, (shape[0], shape[1]), steps)
        if name == job.arch.embedding:
            check_rows(stored)
        rows.append(_row(name, (shape[0], shape[1]), steps, stored, describe(stored)))
    used = {method for row in rows for method in row.steps}
    compressed = {f"{row.name}.weight" for row in rows}
    dense_bytes = sum(header.bytes_of_numbers for name, header in job.source.tensors.items() if name not in compressed)
    total = dense_bytes + sum(-(-row.bits // 8) for row in rows)
    return Plan(
        model=job.source.name,
        recipe=job.recipe.name,
        layers=tuple(rows),
        bytes=total,
        dense_bytes=job.source.bytes,
        bpw=stored_bits / weights,
        model_bpw=total * 8 / job.source.parameters,
        peak_memory_bytes=peak_bytes(job, list(job.tables), job.needs(), used, processes),
        warnings=tuple(_warnings(job, rows, dense_bytes, total)),
        reconstruction=_values(job.recipe.reconstruct),
        distillation=_values(job.recipe.distill),
    )


def added_terms(job: Job, name: str, size: tuple[int, int]) -> list[LowRank]:
    """Return the low-rank terms that the distillation adds to a linear, without values.

    Raises RecipeError for a rank that is larger than the matrix.
    """
    stages = () if job.recipe.distill is None else job.recipe.distill.stages()
    given = [stage.adapt for _, stage in stages if stage.adapt is not None]
    own = [each for each in given if any(matches(pattern, name) for pattern in each.match)]
    steps = [SVD(rank=each.rank, factor_bits=each.factor_bits) for each in own]
    return [term for step in steps if (term := base_and_term(sketch(name, size, [step]))[1]) is not None]


def _values(section: BaseModel | None) -> dict[str, Any] | None:
    return None if section is None else section.model_dump(mode="json")


def _row(name: str, size: tuple[int, int], steps: tuple[StepConfig, ...], stored: Weight, text: str) -> LayerPlan:
    count = bits(stored)
    return LayerPlan(name, size, tuple(s.method for s in steps), count, count / prod(size), text)


def _warnings(job: Job, rows: Sequence[LayerPlan], dense_bytes: int, total: int) -> Iterator[str]:
    """Yield warnings before a run, in a sentence each. `dense_bytes` of the `total` stay dense."""
    yield from (*job.source.notes, *job.assignment.complaints, *job.assignment.notes)
    yield from (f"pattern {pattern!r} matches only layers of earlier rules" for pattern in job.assignment.shadowed)
    inside = [name for name in job.assignment.steps if name not in job.steps]
    outside = [linear.name for linear in job.arch.outside if not _is_compressed(job, linear.name)]
    table = [] if job.arch.tied or job.arch.embedding in job.tables else [job.arch.embedding]  # no linear
    yield from (f"{name} stays dense" for name in (*inside, *_parts(outside, job.arch.stack), *table, *job.arch.other))
    if job.arch.casts_to_head and (job.recipe.head or job.recipe.embeddings):
        shared = f", and {job.arch.embedding}, which it shares" if job.arch.tied else ""
        yield f"{job.arch.head}{shared} must stay dense: the model casts its inputs to the dtype of its weight"
    widths = {name: linear.shape[1] for name, linear in job.arch.linears().items()}
    widths |= {name: job.source.tensors[f"{name}.weight"].shape[1] for name in job.tables}
    yield from _ragged_groups(job, widths)
    for name, steps in job.all_steps.items():
        yield from (f"{name}: {why}" for step in steps if (why := step.substitute(widths[name])))
        lossy = [step for step in steps if step.method not in ("rotate", "presume")]
        if len(lossy) > 1 and isinstance(lossy[0], (SVD, LQER, EoRA)):
            yield f"{name}: {lossy[0].method} comes before anything is lost, so its term holds nothing; put it last"
    used = {step.method for steps in job.all_steps.values() for step in steps}
    able = sorted(name for name in used if methods()[name].needs)
    if job.recipe.calibration is None and able:
        yield f"without calibration, {', '.join(able)} can use only the weights, not the inputs of layers"
    if job.recipe.gates.of_quality and job.ungated is not None:
        yield unmeasured_warning(job.ungated)
    yield from _larger_matrices(job, rows)
    if dense_bytes > DENSE_SHARE * total:
        yield _mostly_dense(job, dense_bytes, total)


def unmeasured_warning(reason: str) -> str:
    """Return the warning for a model whose quality is not measured."""
    return f"{UNGATED}, since {reason}"


def _is_compressed(job: Job, name: str) -> bool:
    """True if the linear `name`, which is outside the blocks, is or shares a table that is compressed."""
    return name in job.tables or (job.arch.tied and name == job.arch.head and job.arch.embedding in job.tables)


def _parts(names: Sequence[str], stack: str) -> Iterator[str]:
    """Yield the parts of a model, such as its tower for images, that hold linears outside of the blocks, with counts.

    `stack`: the module path of the blocks.
    """
    parts: dict[str, int] = {}
    for name in names:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), stack.split("."), strict=False))
        part = ".".join(name.split(".")[: len(list(shared)) + 1])
        parts[part] = parts.get(part, 0) + 1
    for part, count in parts.items():
        yield f"{part} ({count} linears)" if count > 1 else part


def _ragged_groups(job: Job, widths: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each matrix whose width is no multiple of its group size."""
    for name, steps in job.all_steps.items():
        sizes = {getattr(step, "group_size", None) or widths[name] for step in steps}
        for size in sorted(size for size in sizes if widths[name] % size):
            stored = (
                f"the last of its groups has {widths[name] % size}" if size < widths[name] else "a row is one group"
            )
            divisor = max(number for number in range(1, size + 1) if widths[name] % number == 0)
            yield (
                f"{name}: group_size {size} does not divide its width {widths[name]}, so {stored}, which few other "
                f"engines read; {divisor} divides it"
            )


def _larger_matrices(job: Job, rows: Sequence[LayerPlan]) -> Iterator[str]:
    """Yield a sentence for each matrix that is pruned of nothing, and for each that becomes larger."""
    for row in rows:
        before = 8 * job.source.tensors[f"{row.name}.weight"].bytes / prod(row.shape)
        if any(getattr(step, "sparsity", None) == 0 for step in job.all_steps[row.name]):
            mask = f"its mask takes a bit per weight: {row.bpw:g} for {before:g}"
            yield f"{row.name}: sparsity 0 prunes nothing, and {mask}"
        elif row.bpw > before:
            yield f"{row.name}: its {row.bpw:.3f} bits per weight are more than the {before:g} of the dense model"


def _mostly_dense(job: Job, dense_bytes: int, total: int) -> str:
    """Return what most of the dense bytes are, and which setting compresses them."""
    source, arch, recipe = job.source, job.arch, job.recipe
    tables = [name for name in (arch.embedding, arch.head) if _could_be_compressed(job, name)]
    linears = [name for name in arch.linears() if name not in job.steps]
    said = f"{dense_bytes / 1e6:.1f} of {total / 1e6:.1f} MB stay dense"

    def size_of(names: Sequence[str]) -> int:
        return sum(source.tensors[f"{name}.weight"].bytes_of_numbers for name in names)

    by_size = max((tables, linears), key=size_of)
    if not by_size:
        return f"{said}; nothing of it can be compressed"
    said = f"{said}, {size_of(by_size) / 1e6:.1f} of it in {list_names(by_size)}"
    if by_size is linears:
        return f"{said}; a rule that matches them compresses them"
    steps = "{method: rtn, bits: 4, group_size: 64}"
    if recipe.calibration is not None:
        steps = "{method: rotate}, {method: trellis, bits: 3, code: linear, ring: true}"
    key = "head" if arch.embedding in job.tables else "embeddings"
    return f"{said}{TABLE_HINT}{key}=[{steps}]' compresses them"


def _could_be_compressed(job: Job, name: str) -> bool:
    """True if the token table or the output head `name` stays dense and need not."""
    if name in job.tables or f"{name}.weight" not in job.source.tensors or not is_causal(job.source.config):
        return False
    return job.has_plain_table if name == job.arch.embedding else not job.arch.casts_to_head


def check_memory(planned: Plan, device: str, processes: int = 1) -> None:
    """Raise MemoryLimitError if so many `processes` of the run do not fit into this machine, even an idle one."""
    total, needed = total_memory(), planned.peak_memory_bytes * processes
    if device == "cpu" and needed > total:
        beside, fewer = (f" in {processes} processes", "fewer processes, ") if processes > 1 else ("", "")
        raise MemoryLimitError(
            f"compressing {planned.model}{beside} takes about {needed / 1e6:.1f} MB and this machine has "
            f"{total / 1e6:.1f} MB; take {fewer}fewer or shorter calibration samples, or a larger machine"
        )
