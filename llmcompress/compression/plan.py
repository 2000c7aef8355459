"""A recipe laid over an opened model, and the plan of its run: from config and tensor headers alone.

Every compression starts from the same `Job` and checks itself by its `plan`, so a run does exactly what `plan` prints.
Bits are counted on the expression that each step announces for the layer's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from math import prod
from typing import Any

from pydantic import BaseModel

from llmcompress.calibrate.rehearsal import rehearsed
from llmcompress.compression.fuse.awq import check_awq
from llmcompress.compression.fuse.rotation import rotated_source
from llmcompress.compression.memory_estimate import peak_bytes
from llmcompress.compression.recipe_checks import check_calibration, check_tables, check_task
from llmcompress.compression.ties import Tied, ties_of
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens, check_length
from llmcompress.distill.check_fused import check_fused
from llmcompress.errors import MemoryLimitError, RecipeError
from llmcompress.methods.layer import StepConfig, methods, sketch
from llmcompress.models.auto_class import architectures, is_causal
from llmcompress.models.dense import DenseModel
from llmcompress.models.families import Architecture, architecture
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.matching import Assignment, assign
from llmcompress.runtime.memory import total_memory
from llmcompress.weight.expression import bits, describe
from llmcompress.weight.nodes import Weight
from llmcompress.weight.rows import check_rows

ALONE = {"distill": None}  # of a recipe


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
class Plan:
    """A whole run. `bytes`: of the weights on disk. `peak_memory_bytes`: an estimate for this machine."""

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

    timed: Callable[[], float] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def seconds(self) -> float | None:
        """The time of the run on this machine as it is now, from trials that take a second or more; None in a run."""
        return None if self.timed is None else self.timed()

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields, and `seconds`."""
        values = asdict(replace(self, timed=None))
        del values["timed"]
        return values | {"seconds": self.seconds}


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe laid over an opened model: planning, allocating and compressing all start from it."""

    source: DenseModel
    arch: Architecture
    recipe: Recipe
    assignment: Assignment

    @cached_property
    def steps(self) -> dict[str, tuple[StepConfig, ...]]:
        """The steps of every linear that will be compressed; none for one that is all of a matrix of others."""
        ruled, ties = self.assignment.steps, self.ties
        return {
            name: ties[name].steps_of(name) if name in ties else steps
            for name, steps in ruled.items()
            if steps or name in ties
        }

    @cached_property
    def ties(self) -> dict[str, Tied]:
        """The matrix that each linear has in common with others; empty for blocks that are not tied."""
        found, tie = self.assignment, self.recipe.tie
        if tie is None:
            return {}
        dense = [name for name, steps in found.steps.items() if not steps and name not in found.unruled]
        return ties_of(tie, self.arch, found.steps, dense)

    @cached_property
    def tables(self) -> dict[str, tuple[StepConfig, ...]]:
        """The steps of the token table and of the output head, as far as they will be compressed."""
        found = {self.arch.embedding: self.recipe.embeddings, self.arch.head: self.recipe.head}
        return {name: steps for name, steps in found.items() if steps}

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run. Raises RecipeError if a step cannot work on a layer's shape, and for a target."""
        return _plan(self)

    @cached_property
    def undistilled(self) -> Job:
        """The job without its distillation."""
        return self if self.recipe.distill is None else replace(self, recipe=self.recipe.model_copy(update=ALONE))

    @cached_property
    def tokens(self) -> CalibrationTokens | None:
        """The calibration tokens, read once; None for a recipe without calibration. Raises what reading text does."""
        config, source = self.recipe.calibration, self.source
        if config is None or self.recipe.distill is not None:
            return None if config is None else self.undistilled.tokens
        return calibration_tokens(config, source.tokenizer(), source.load, source.config)

    @property
    def ungated(self) -> str | None:
        """The reason why the finished model's quality cannot be measured; None if it can."""
        text, config = self.recipe.calibration, self.source.config
        if text is None:
            return "the recipe has no calibration text"
        if not text.held_out:
            return "none of the calibration text is held out"
        if not is_causal(config):
            return f"a {architectures(config)[0]} does not predict the next token"
        return None

    def with_recipe(self, recipe: Recipe) -> Job:
        """Return the job of another recipe for the same model. Raises RecipeError as `prepare` does."""
        return _laid(self.source, self.arch, recipe)

    def check_rules(self) -> None:
        """Raise RecipeError for a pattern that matches no layer of the model."""
        if self.assignment.unmatched:
            raise RecipeError(self.assignment.complaint())

    def needs(self) -> dict[str, frozenset[str]]:
        """Return the statistics that each compressed matrix's methods read, and those that its error needs."""
        known = methods()
        extra = {"outer", "cross"} if self.recipe.asymmetric else {"outer"}
        needs = {
            name: frozenset(extra).union(*(known[s.method].needs for s in steps)) for name, steps in self.steps.items()
        }
        only_looked_up = None if self.arch.tied else self.arch.embedding
        return needs | {name: frozenset({"outer"} if name != only_looked_up else ()) for name in self.tables}


def prepare(source: DenseModel, recipe: Recipe) -> Job:
    """Lay a recipe over a model. Raises InputError for a model of unknown structure, and RecipeError for a recipe
    that does not suit the model or whose methods require calibration that it lacks."""
    check_task(source, recipe)
    if recipe.fuse is not None and recipe.fuse.rotation:
        source = rotated_source(source, recipe.seed, recipe.fuse.untie)
    arch = architecture(source.config, source.skeleton())
    if arch.family is None:
        arch = rehearsed(source, arch, recipe.calibration is not None)
    return _laid(source, arch, recipe)


def _laid(source: DenseModel, arch: Architecture, recipe: Recipe) -> Job:
    """Check the recipe against the model, and return the job."""
    if recipe.distill is not None:
        check_fused(recipe.fuse, recipe.distill)
        for text in recipe.distill.texts():
            check_length(text.length, source.config)
    check_calibration(recipe)
    check_tables(recipe, arch, source)
    others = [linear.name for linear in arch.outside] + [name.rpartition(".")[0] for name in source.tensors]
    job = Job(source, arch, recipe, assign(recipe, list(arch.linears()), others))
    _ = job.ties  # refuses blocks that differ
    if recipe.fuse is not None and recipe.fuse.awq:
        check_awq(arch, job.steps)
    return job


def _plan(job: Job) -> Plan:
    """Plan the job, as `Job.plan` says; `allocate` must choose the steps of a target first."""
    if job.recipe.target is not None:
        raise RecipeError(
            "the steps for a target are chosen first; choose them, or take the recipe that compress leaves"
        )
    linears = job.arch.linears()
    rows: list[LayerPlan] = []
    alike: dict[tuple[tuple[int, int], str, bool], LayerPlan] = {}  # a large model has few shapes
    for name, steps in job.steps.items():
        size, tied = linears[name].shape, job.ties.get(name)
        key = size, repr(steps), tied is not None and tied.is_first(name)
        if key not in alike:
            stored = tied.sketch(name) if tied else sketch(name, size, steps)
            text = tied.described(name, stored) if tied else describe(stored)
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
    # tensors that a run leaves as they are keep their own type
    dense = {f"{row.name}.weight" for row in rows}
    kept = sum(header.bytes for name, header in job.source.tensors.items() if name not in dense)
    total = kept + sum(-(-row.bits // 8) for row in rows)
    return Plan(
        model=job.source.name,
        recipe=job.recipe.name,
        layers=tuple(rows),
        bytes=total,
        dense_bytes=job.source.bytes,
        bpw=stored_bits / weights,
        model_bpw=total * 8 / job.source.parameters,
        peak_memory_bytes=peak_bytes(job.source, job.arch, job.recipe, list(job.tables), job.needs(), used),
        warnings=(*_warnings(job), *_larger(job, rows)),
        reconstruction=_values(job.recipe.reconstruct),
        distillation=_values(job.recipe.distill),
    )


def _values(section: BaseModel | None) -> dict[str, Any] | None:
    return None if section is None else section.model_dump(mode="json")


def _row(name: str, size: tuple[int, int], steps: tuple[StepConfig, ...], stored: Weight, text: str) -> LayerPlan:
    count = bits(stored)
    return LayerPlan(name, size, tuple(s.method for s in steps), count, count / prod(size), text)


def _warnings(job: Job) -> tuple[str, ...]:
    """Return warnings before a run: patterns that match nothing, and linears that stay dense."""
    shadowed = [f"pattern {pattern!r} matches only layers of earlier rules" for pattern in job.assignment.shadowed]
    dense = [name for name in job.assignment.steps if name not in job.steps]
    outside = [linear.name for linear in job.arch.outside if not _is_compressed(job, linear.name)]
    left = [f"{name} stays dense" for name in (*dense, *_parts(outside, job.arch.stack), *job.arch.other)]
    return (
        *job.source.notes,
        *job.assignment.complaints,
        *shadowed,
        *left,
        *_ragged(job),
        *_without_data(job),
        *_ungated(job),
    )


def _ungated(job: Job) -> tuple[str, ...]:
    """Return a sentence if the recipe has gates of quality that cannot be measured."""
    if not job.recipe.gates.of_quality or job.ungated is None:
        return ()
    return (unmeasured(job.ungated),)


def unmeasured(reason: str) -> str:
    """Return the warning for a model whose quality nobody has measured."""
    return f"gates: nobody measures how far the model is from the dense one, since {reason}"


def _parts(names: Sequence[str], stack: str) -> Iterator[str]:
    """Yield the parts of a model that linears outside of its blocks are in, as the tower for images, with their count.

    `stack`: the module path of the blocks.
    """
    parts: dict[str, int] = {}
    for name in names:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), stack.split("."), strict=False))
        part = ".".join(name.split(".")[: len(list(shared)) + 1])
        parts[part] = parts.get(part, 0) + 1
    for part, count in parts.items():
        yield f"{part} ({count} linears)" if count > 1 else part


def _ragged(job: Job) -> Iterator[str]:
    """Yield a sentence for each matrix whose width is no multiple of its group size."""
    widths = {name: linear.shape[1] for name, linear in job.arch.linears().items()}
    widths |= {name: job.source.tensors[f"{name}.weight"].shape[1] for name in job.tables}
    for name, steps in (job.steps | job.tables).items():
        sizes = {getattr(step, "group_size", None) or widths[name] for step in steps}
        for size in sorted(size for size in sizes if widths[name] % size):
            stored = (
                f"the last of its groups has {widths[name] % size}" if size < widths[name] else "a row is one group"
            )
            yield (
                f"{name}: group_size {size} does not divide its width {widths[name]}, so {stored}, which few other "
                f"engines read; {max(one for one in range(1, size + 1) if widths[name] % one == 0)} divides it"
            )


def _larger(job: Job, rows: Sequence[LayerPlan]) -> Iterator[str]:
    """Yield a sentence for each matrix that nothing is pruned of, and for each that becomes larger."""
    for row in rows:
        before = 8 * job.source.tensors[f"{row.name}.weight"].bytes / prod(row.shape)
        if any(getattr(step, "sparsity", None) == 0 for step in (job.steps | job.tables)[row.name]):
            mask = f"its mask takes a bit per weight: {row.bpw:g} for {before:g}"
            yield f"{row.name}: sparsity 0 prunes nothing, and {mask}"
        elif row.bpw > before:
            yield f"{row.name}: its {row.bpw:.3f} bits per weight are more than the {before:g} of the dense model"


def _without_data(job: Job) -> tuple[str, ...]:
    """Return a sentence if methods that can learn from data have none."""
    used = {step.method for steps in (job.steps | job.tables).values() for step in steps}
    able = sorted(name for name in used if methods()[name].needs)
    if job.recipe.calibration is not None or not able:
        return ()
    return (f"without calibration, {', '.join(able)} can use only the weights, not the inputs of layers",)


def _is_compressed(job: Job, name: str) -> bool:
    """True if the linear `name`, which is outside the blocks, is or shares a table that is compressed."""
    return name in job.tables or (job.arch.tied and name == job.arch.head and job.arch.embedding in job.tables)


def check_memory(planned: Plan, device: str, processes: int = 1) -> None:
    """Raise MemoryLimitError if the run would not fit into this machine even if nothing else ran on it, or not so many
    `processes` of it."""
    total, needed = total_memory(), planned.peak_memory_bytes * processes
    if device == "cpu" and needed > total:
        beside, fewer = (f" in {processes} processes", "fewer processes, ") if processes > 1 else ("", "")
        raise MemoryLimitError(
            f"compressing {planned.model}{beside} takes about {needed / 1e6:.1f} MB and this machine has "
            f"{total / 1e6:.1f} MB; take {fewer}fewer or shorter calibration samples, or a larger machine"
        )
