"""The models of a distillation before its first step, in the precision and with the kind of teacher that it asks for.

A job begins as often as it is asked to: once for its recipe, and once for every control beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from llmcompress.data.distillation import Data
from llmcompress.distillation.context import Report, TrainContext
from llmcompress.distillation.metrics import Metrics
from llmcompress.distillation.objective.heads import check_boundaries, check_head
from llmcompress.distillation.objective.hidden_states import last_read
from llmcompress.distillation.on_policy import check_on_policy
from llmcompress.distillation.parallel.launch import check_enough, is_given, loading_device, sharded
from llmcompress.distillation.phases import Learned, learn
from llmcompress.distillation.resume import METRICS
from llmcompress.distillation.student.model import Student
from llmcompress.distillation.teacher.cached import measured_bias, remembered, taught_from_cache
from llmcompress.distillation.teacher.predictions import ReadsAlong, ReadsBeginning, Teaching, Unheard
from llmcompress.distillation.teacher.quantized import taught_by_quantized
from llmcompress.losses.loss import reads_states
from llmcompress.models.dense.headers import stored_dtype
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import Distillation, Teacher, Term
from llmcompress.runtime.precision import product_dtype, products
from llmcompress.runtime.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple["PreTrainedModel", "PreTrainedModel"]  # student and teacher


@dataclass(frozen=True, eq=False)
class DistillationJob:
    """A distillation of the model at `pupil`, towards that at `teacher`, into the folder `output`. `store`: of its
    states."""

    pupil: Place
    teacher: Place
    recipe: Distillation
    output: Path
    data: Data
    store: Store
    accelerator: Accelerator
    ranks: Ranks

    def context(self, pair: Pair) -> TrainContext:
        """Return everything that a training reads. Raises RecipeError for too little data."""
        recipe, accelerator, [student, teacher] = self.recipe, self.accelerator, pair
        dtype = product_dtype(recipe.compute, accelerator.device)
        teacher.requires_grad_(False)
        check_enough(len(self.data.sequences), recipe)
        run = TrainContext(
            recipe,
            Student(student, {}, {}),
            teacher,
            lambda: teacher,
            _teaching(pair, recipe, accelerator),
            self.data,
            self.store,
            accelerator,
            Metrics(self.store.folder / METRICS, accelerator),
            # recomputed activations must come from the same operations, and the second time torch's attention is there
            partial(products, accelerator.device, dtype, attention=not recipe.checkpointing),
            self.ranks,
        )
        check_on_policy(run)
        return run


def _teaching(pair: Pair, recipe: Distillation, accelerator: Accelerator) -> Teaching:
    """Return the teacher as far as it has to run: a cached or quantized one reads along to begin with."""
    student, teacher = pair
    if recipe.teacher != Teacher() or any(term.of.reads() != "nothing" for term in _on_predictions(recipe)):
        return ReadsAlong(teacher)
    classes = teacher.get_input_embeddings().get_parameter("weight").shape[0]
    last = last_read(student, teacher, recipe.losses)
    if last is None:
        return Unheard(classes)
    # what is sharded is gathered block by block, in an order that has to come to its end
    return ReadsAlong(teacher) if sharded(accelerator) else ReadsBeginning(teacher, last, classes)


def _on_predictions(recipe: Distillation) -> list[Term]:
    return [term for term in recipe.losses if not reads_states(term.of)]


def load_pair(pupil: Place, teacher: Place, recipe: Distillation, accelerator: Accelerator) -> Pair:
    """Load student and teacher. Where another process gives this one its shares of them, their files are only mapped,
    in the dtypes that they are stored in."""
    where = loading_device(accelerator)
    dtype = product_dtype(recipe.compute, accelerator.device) if recipe.teacher.bits is None else torch.float32
    check_fits(where, "distilling", [pupil, teacher], dtype=dtype)
    dtypes = (torch.float32, dtype)
    if is_given(accelerator):
        dtypes = (stored_dtype(pupil.folder), stored_dtype(teacher.folder))
    pair = (
        load_model(pupil, where, dtypes[0]),
        load_model(teacher, where if recipe.teacher.bits is None else "cpu", dtypes[1]),
    )
    for model in pair:
        check_causal(model.config, "distilling")
    return pair


def check_outputs(pair: Pair, data: Data) -> None:
    """Raise InputError for a model whose logits, or whose documents in one sequence, are not computed as here."""
    for model in pair:
        check_head(model, data.sequences.ids)
        if data.sequences.documents is not None:
            check_boundaries(model, data.sequences.ids)


def taught(run: TrainContext, place: Place, output: Path) -> tuple[TrainContext, dict[str, float] | None]:
    """Return `run` with the kind of teacher that its recipe asks for, from `place`, and the cost of quantizing it."""
    asked, cost = run.recipe.teacher, None
    if asked.bits is not None or asked.kind == "cached":
        run = remembered(run, place)
    if asked.bits is not None:
        run, cost = taught_by_quantized(run, asked.bits, place)
    if asked.kind == "cached":
        run = taught_from_cache(run, asked, place, output)
    return run, cost


def learned_from(run: TrainContext, progress: Report | None) -> tuple[Learned, dict[str, dict[str, float]] | None]:
    """Run the phases; return what they learned, and the bias of a cached teacher before and after."""
    if run.recipe.teacher.kind == "online":
        return learn(run, progress), None
    k = run.recipe.teacher.k
    before = measured_bias(run, k)
    learned = learn(run, progress)
    return learned, {"before": before, "after": measured_bias(run, k)}
