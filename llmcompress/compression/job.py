"""A recipe laid over an opened model: planning, allocating and compressing all start from the same `Job`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.calibration.dry_run import probe_architecture
from llmcompress.calibration.gradients import Importance, count_read, measure_importance
from llmcompress.compression.awq import check_awq
from llmcompress.compression.rotation import rotated_source
from llmcompress.compression.ties import CommonMatrix, common_matrices
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens, check_length
from llmcompress.distillation.requirements import check_fused
from llmcompress.errors import InputError, RecipeError
from llmcompress.methods.layer import StepConfig, methods
from llmcompress.models.dense.config import context_length
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.load import load_writer
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import architectures, check_causal, is_causal
from llmcompress.recipe.calibration import RANDOM, Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.matching import Assignment, assign
from llmcompress.recipe.rules import InputRounding
from llmcompress.runtime.phases import phase
from llmcompress.runtime.precision import product_dtype
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.inputs import GROUPS
from llmcompress.weight.rows import is_plain_table, row_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ComputeOnce = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]  # see `RunFiles.compute_once`


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe laid over an opened model, from config and headers alone."""

    source: DenseModel
    arch: Architecture
    recipe: Recipe
    assignment: Assignment
    shared: dict[tuple[Hashable, ...], Any] = field(default_factory=dict, repr=False)  # by all jobs made from one

    @cached_property
    def steps(self) -> dict[str, tuple[StepConfig, ...]]:
        """The steps of every linear that will be compressed; no steps for one that is nothing but a common matrix."""
        ruled, ties = self.assignment.steps, self.ties
        return {
            name: ties[name].steps_of(name) if name in ties else steps
            for name, steps in ruled.items()
            if steps or name in ties
        }

    @cached_property
    def ties(self) -> dict[str, CommonMatrix]:
        """The matrix that each linear shares with others; empty for blocks that are not tied."""
        ruled, tie = self.assignment, self.recipe.tie
        if tie is None:
            return {}
        dense = [name for name, steps in ruled.steps.items() if not steps and name not in ruled.unruled]
        return common_matrices(tie, self.arch, ruled.steps, dense)

    @cached_property
    def tables(self) -> dict[str, tuple[StepConfig, ...]]:
        """The steps of the token table and the output head that will be compressed.

        Steps of a table that is only looked up need no inputs.
        """
        arch, recipe = self.arch, self.recipe
        if arch.tied:
            return {arch.embedding: recipe.embeddings} if recipe.embeddings and not arch.casts_to_head else {}
        blind = tuple(step for each in recipe.embeddings if (step := each.without_inputs()) is not None)
        steps = {arch.embedding: blind if recipe.table is None else recipe.table, arch.head: self._head_steps}
        return {name: each for name, each in steps.items() if each}

    @property
    def inputs(self) -> dict[str, InputRounding]:
        """The formats that the inputs of linears are rounded to, by name; the others' stay as they are."""
        return self.assignment.inputs

    @cached_property
    def all_steps(self) -> dict[str, tuple[StepConfig, ...]]:
        """The steps of everything that will be compressed, by name."""
        return self.steps | self.tables

    @cached_property
    def has_plain_table(self) -> bool:
        """True if the token table only looks up and scales rows, so a compressed one can take its place."""
        model = self.source.skeleton()
        tied_to_cast = self.arch.tied and self.arch.casts_to_head
        return is_plain_table(model.get_input_embeddings()) and not _is_biased(model, self.arch) and not tied_to_cast

    @property
    def _head_steps(self) -> tuple[StepConfig, ...]:
        """The steps of a head that is not tied: its own, or those of `embeddings:` unless a rule keeps it dense."""
        head, recipe = self.arch.head, self.recipe
        if self.arch.casts_to_head:
            return ()
        if recipe.head is not None:
            return recipe.head
        stays = f"{head}.weight" not in self.source.tensors or recipe.keeps_dense(head)
        return () if stays else recipe.embeddings

    @cached_property
    def undistilled(self) -> Job:
        """The job without its distillation."""
        recipe = self.recipe
        return self if recipe.distill is None else replace(self, recipe=recipe.model_copy(update={"distill": None}))

    @property
    def tokens(self) -> CalibrationTokens | None:
        """The calibration tokens; None for a recipe without calibration."""
        return None if self.recipe.calibration is None else self.read_tokens(self.recipe.calibration)

    @phase("text")
    def read_tokens(self, text: Calibration) -> CalibrationTokens:
        """Return the tokens of `text`, read once for all jobs made from one."""
        source, key = self.source, ("text", text.model_dump_json())
        if key not in self.shared:
            tokenizer = source.tokenizer()
            self.shared[key] = calibration_tokens(text, tokenizer, partial(load_writer, source), source.config)
        tokens: CalibrationTokens = self.shared[key]
        return tokens

    @property
    def ungated(self) -> str | None:
        """The reason why the finished model's quality cannot be measured; None if it can."""
        text, config = self.recipe.calibration, self.source.config
        if text is None:
            return "the recipe has no calibration text"
        if text.dataset == RANDOM:
            return "random tokens are nothing to judge it by"
        if not text.held_out:
            return "none of the calibration text is held out"
        if not is_causal(config):
            return f"a {architectures(config)[0]} does not predict the next token"
        return None

    def with_recipe(self, recipe: Recipe) -> Job:
        """Return the job of another recipe for the same model. Raises RecipeError as `prepare` does."""
        return _build_job(self.source, self.arch, recipe, self.shared)

    def check_rules(self) -> None:
        """Raise RecipeError for a pattern that matches no layer of the model."""
        if self.assignment.unmatched:
            raise RecipeError(self.assignment.complaint())

    def needs(self) -> dict[str, frozenset[str]]:
        """Return the statistics that the methods of each compressed matrix read and that its error needs, by name."""
        known = methods()
        extra = {"outer", "cross"} if self.recipe.asymmetric else {"outer"}
        needs = {
            name: frozenset(extra | ({"cross"} if name in self.inputs else set())).union(
                *(known[s.method].needs for s in steps)
            )
            for name, steps in self.steps.items()
        }
        return needs | {name: frozenset({"outer"} if name != self.arch.only_looked_up else ()) for name in self.tables}


def prepare(source: DenseModel, recipe: Recipe) -> Job:
    """Lay a recipe over a model.

    Raises InputError for a model of unknown structure, RecipeError for a recipe that does not suit the model or whose
    methods require calibration that it lacks.
    """
    _check_task(source, recipe)
    recipe = _fit_context(recipe, source)
    if recipe.fuse is not None and recipe.fuse.rotation:
        source = rotated_source(source, recipe.seed, recipe.fuse.untie)
    arch = architecture(source.config, source.skeleton())
    if shared := [name for name in arch.linears() if f"{name}.weight" in source.tied]:
        raise InputError(
            f"blocks of {source.name} have weights in common ({shared[0]} for one), so they cannot be compressed "
            f"apart; choose another model"
        )
    if arch.family is None:
        arch = probe_architecture(source, arch, recipe.calibration is not None)
    return _build_job(source, arch, recipe, {})


def _fit_context(recipe: Recipe, source: DenseModel) -> Recipe:
    """Shorten calibration sequences to the model's context if the recipe names no length."""
    text, context = recipe.calibration, context_length(source.config)
    if text is None or context is None or "length" in text.model_fields_set or text.length <= context:
        return recipe
    return recipe.model_copy(update={"calibration": text.model_copy(update={"length": context})})


def _check_task(source: DenseModel, recipe: Recipe) -> None:
    """Raise InputError for sections that need a model that predicts the next token."""
    sections = {
        "target:": recipe.target,
        "distill:": recipe.distill,
        "fuse:": recipe.fuse,
        "embeddings:": recipe.embeddings,
        "head:": recipe.head,
        "table:": recipe.table,
        "calibration by dataset: self": recipe.calibration is not None and recipe.calibration.dataset == "self",
    }
    for name in (name for name, value in sections.items() if value):
        check_causal(source.config, name)


def _build_job(source: DenseModel, arch: Architecture, recipe: Recipe, shared: dict[tuple[Hashable, ...], Any]) -> Job:
    """Check the recipe against the model, and return the job."""
    if recipe.distill is not None:
        check_fused(recipe.fuse, recipe.distill)
        for text in recipe.distill.texts():
            check_length(text.length, source.config)
    _check_calibration(recipe)
    _check_tables(recipe, arch, source)
    others = [linear.name for linear in arch.outside] + [name.rpartition(".")[0] for name in source.tensors]
    job = Job(source, arch, recipe, assign(recipe, list(arch.linears().values()), others), shared)
    _ = job.ties  # refuses blocks that differ
    _check_inputs(job)
    if recipe.fuse is not None and recipe.fuse.awq:
        check_awq(arch, job.steps)
    return job


def _check_inputs(job: Job) -> None:
    """Raise RecipeError for linears that would round the same input to different numbers, or in ragged groups."""
    for group in (group for block in job.arch.blocks for group in block.groups):
        names = [linear.name for linear in group if linear.name in job.steps]
        for name in names:
            if job.inputs.get(name) != job.inputs.get(names[0]):
                raise RecipeError(
                    f"rules: {names[0]} and {name} read the same input; give them the same inputs: in their rules"
                )
    linears = job.arch.linears()
    for name, asked in job.inputs.items():
        size, width = GROUPS.get(asked.format, 1), linears[name].shape[1]
        if width % size:
            raise RecipeError(
                f"rules: inputs in {asked.format} come in groups of {size}, which do not divide the {width} of {name}; "
                f"give it a rule with other inputs"
            )


def _check_calibration(recipe: Recipe) -> None:
    """Raise RecipeError if a method requires data and the recipe has none."""
    if recipe.calibration is not None:
        return
    lists = [*(rule.steps for rule in recipe.rules), recipe.embeddings, recipe.head or (), recipe.table or ()]
    lists += [(recipe.tie.term,)] if recipe.tie is not None and recipe.tie.term is not None else []
    hungry = sorted({name for steps in lists for name in _hungry_methods(steps)})
    fuse = recipe.fuse
    others = {"asymmetric": recipe.asymmetric, "fuse: awq": fuse is not None and fuse.awq, "kv_cache": recipe.kv_cache}
    for name in (name for name, value in others.items() if value and not hungry):
        raise RecipeError(f"{name} requires calibration; add it to the recipe, or leave {name.split(':')[0]} out")
    if hungry:
        frugal = ", ".join(name for name, method in sorted(methods().items()) if method.data_free)
        raise RecipeError(
            f"{', '.join(hungry)} requires calibration; add it to the recipe, as calibration: {{dataset: builtin}} "
            f"(or self: the model writes the text), or use methods that need none: {frugal}"
        )


def _hungry_methods(steps: Sequence[StepConfig]) -> Iterator[str]:
    """Yield the methods of these steps that require calibration."""
    for step in steps:
        if step.presumes:
            return
        if not methods()[step.method].data_free:
            yield step.method


def _is_biased(model: PreTrainedModel, arch: Architecture) -> bool:
    """True if the output head is the token table, but for a bias."""
    return arch.tied and getattr(model.get_output_embeddings(), "bias", None) is not None


def _check_tables(recipe: Recipe, arch: Architecture, source: DenseModel) -> None:
    """Raise RecipeError for steps that the token table or the output head of this model cannot have."""
    alone = {"head": recipe.head, "table": recipe.table} if not recipe.embeddings else {}
    for key in (key for key, steps in alone.items() if steps and arch.tied):
        raise RecipeError(
            f"{key}: the output head of {source.name} is its token table; give its steps as embeddings:, or none by "
            f"{key}: null"
        )
    if alone.get("head") and (not arch.head or f"{arch.head}.weight" not in source.tensors):
        raise RecipeError(f"head: {source.name} has no output head of its own; leave head: out")
    if not recipe.embeddings and not recipe.table:
        return
    model = source.skeleton()
    if _is_biased(model, arch):
        raise RecipeError(
            f"embeddings: the output head of {source.name} is its token table and has a bias, which no compressed one "
            f"can have; leave embeddings: out"
        )
    try:
        row_scale(model.get_input_embeddings())
    except TypeError as error:
        raise RecipeError(f"embeddings: {error}; leave embeddings: out") from error
    if arch.tied:
        return
    if recipe.table is None:
        key, hungry = "embeddings", [step.method for step in recipe.embeddings if step.without_inputs() is None]
    else:
        key, hungry = "table", list(_hungry_methods(recipe.table))
    if hungry:
        raise RecipeError(
            f"{key}: {hungry[0]} learns from a layer's inputs, and the token table of {source.name}, which is not its "
            f"output head, has none; give {hungry[0]} as head:, and steps such as rtn as table:"
        )


def gradient_importance(
    job: Job, sequences: Tensor, device: torch.device, ranks: Ranks = ALONE, compute_once: ComputeOnce | None = None
) -> Importance | None:
    """Return the importance of tokens and rows for `sequences [sequences, length]`; None unless the recipe asks for it.

    Reads as many of them as `count_read` says, once for all jobs made from one. `compute_once` stores the result for a
    run that resumes, but not of several processes, each of which has sequences of its own. Raises what
    `measure_importance` raises.
    """
    recipe = job.recipe
    count, length = count_read(recipe.token_weights, *sequences.shape)
    if count == 0:
        return None
    sequences = sequences[[index * len(sequences) // count for index in range(count)], :length]  # of all kinds of text
    dtype = product_dtype(recipe.compute, device)
    key = ("importance", ranks.count, sequences.numpy().tobytes(), recipe.seed, device, dtype)

    def compute() -> dict[str, Tensor]:
        if key not in job.shared:
            measure = phase("gradients")(measure_importance)
            importance = measure(
                job.source, job.arch, sequences, seed=recipe.seed, device=device, dtype=dtype, ranks=ranks
            )
            job.shared[key] = importance.tensors()
        tensors: dict[str, Tensor] = job.shared[key]
        return tensors

    stored = compute() if compute_once is None or ranks.count > 1 else compute_once("importance", compute)
    return Importance.from_tensors(stored)
