"""From a job to the context of its training: the models, in the precision and with the kind of teacher that the recipe
asks for. A job is set up once for its recipe, and once for every control beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator

from llmcompress.distillation.context import DistillationJob, TrainContext
from llmcompress.distillation.metrics import Metrics
from llmcompress.distillation.objective.early_exits import Exits
from llmcompress.distillation.objective.forward import check_boundaries, check_head
from llmcompress.distillation.objective.hidden_states import last_block_read
from llmcompress.distillation.on_policy import check_on_policy
from llmcompress.distillation.parallel.launch import (
    check_enough,
    check_experts,
    is_sharded,
    loading_device,
    receives_shares,
)
from llmcompress.distillation.student.model import Student
from llmcompress.distillation.teacher.cache import cache_teacher
from llmcompress.distillation.teacher.predictions import (
    HeldOutTeacher,
    NoTeacher,
    OnlineTeacher,
    TeacherSource,
    TruncatedTeacher,
)
from llmcompress.distillation.teacher.quantized import load_quantized, measure_quantization
from llmcompress.losses.loss import reads_states
from llmcompress.models.dense.experts import experts_of, unfuse
from llmcompress.models.dense.headers import stored_dtype
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.models.files import file_names
from llmcompress.recipe.distillation import Distillation, Teacher
from llmcompress.runtime.precision import product_dtype
from llmcompress.runtime.ranks import local_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_pair(
    student: Place, teacher: Place, recipe: Distillation, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load student and teacher. A process that receives its shares of them from another maps their files alone, in the
    dtypes that they are stored in."""
    where = loading_device(accelerator)
    dtype = product_dtype(recipe.compute, accelerator.device) if recipe.teacher.bits is None else torch.float32
    processes = 1 if is_sharded(accelerator) else local_count()  # sharded models are whole in the first process alone
    check_fits(where, "distilling", [student, teacher], dtype=dtype, processes=processes)
    if recipe.teacher.bits is not None:
        way_out = "leave bits of the teacher out, or take a larger machine"
        check_fits("cpu", "reading the held-out text beside a GPU", [teacher], way_out=way_out, processes=processes)
    dtypes = (torch.float32, dtype)
    if receives_shares(accelerator):
        dtypes = (stored_dtype(student.folder), stored_dtype(teacher.folder))
    pair = (
        load_model(student, where, dtypes[0]),
        load_model(teacher, where if recipe.teacher.bits is None else "cpu", dtypes[1], numbers=True),
    )
    for model in pair:
        check_causal(model.config, "distilling")
    unfuse(pair[0])  # matrices of experts train like others
    return pair


def check_job(job: DistillationJob, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise RecipeError or InputError for a job whose recipe, data and models do not go together, or for a model that
    does not compute its logits, or keep documents of one sequence apart, as the training does."""
    check_enough(len(job.data.sequences), job.recipe)
    if experts_of(student):
        check_experts(job.accelerator)
    check_on_policy(job)
    last_block_read(student, teacher, job.recipe.losses)
    if not receives_shares(job.accelerator):  # in such a process the models have another precision
        for model in (student, teacher):
            check_head(model, job.data.sequences.ids)
            if job.data.sequences.documents is not None:
                check_boundaries(model, job.data.sequences.ids)
    Exits.of(student, job.recipe.losses)


def set_up(job: DistillationJob, student: PreTrainedModel, teacher: PreTrainedModel) -> TrainContext:
    """Return the context of the training. `student`, `teacher`: as `load_pair` gives them.

    A teacher that is cached or quantized, or that no loss reads, reads the held-out sequences beforehand, and is gone
    afterwards. Raises what `cache_teacher`, `load_quantized` and `measure_quantization` raise.
    """
    options, device, cost = job.recipe.teacher, job.accelerator.device, None
    teacher.requires_grad_(False)
    source, reading = choose_source(job, student, teacher), teacher
    if options != Teacher() or (isinstance(source, NoTeacher) and not is_sharded(job.accelerator)):
        with job.autocast():
            teacher = cast("PreTrainedModel", HeldOutTeacher(reading, job.data.held_out).to(device, job.dtype))
    if options.bits is not None:
        reading = load_quantized(job.teacher_place, options.bits, device, job.dtype)
        cost = measure_quantization(job, teacher, reading, options.bits)
    if options != Teacher():
        source = cache_teacher(job, reading) if options.kind == "cached" else OnlineTeacher(reading)
    return TrainContext(
        **vars(job),
        student=Student(student, {}, {}),
        teacher=teacher,
        source=source,
        metrics=Metrics(job.store.folder / file_names.METRICS, job.accelerator, tracked=job.tracked),
        quantization=cost,
    )


def choose_source(job: DistillationJob, student: PreTrainedModel, teacher: PreTrainedModel) -> TeacherSource:
    """Return the teacher as far as its losses read it: whole, up to a block, or not at all."""
    if any(term.of.reads() != "nothing" for term in job.recipe.losses if not reads_states(term.of)):
        return OnlineTeacher(teacher)
    last = last_block_read(student, teacher, job.recipe.losses)
    if last is not None and is_sharded(job.accelerator):  # its blocks are gathered in an order that has to end
        return OnlineTeacher(teacher)
    table = cast(torch.nn.Embedding, teacher.get_input_embeddings())  # whose weight, if compressed, is a payload
    return NoTeacher(table.num_embeddings) if last is None else TruncatedTeacher(teacher, last, table.num_embeddings)
