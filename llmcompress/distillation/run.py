"""From a student's folder and its dense teacher to a recovered folder of the same format and size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from llmcompress.data.distillation import Data, read_data
from llmcompress.distillation.context import TRAINING, DistillationJob, Report
from llmcompress.distillation.metrics import start_trackers
from llmcompress.distillation.parallel.launch import launched_accelerator, own_accelerate
from llmcompress.distillation.phases import run_phases
from llmcompress.distillation.requirements import advise_on_memory, check_student, find_known_text
from llmcompress.distillation.result import DistillationResult, result_of, write_result
from llmcompress.distillation.setup import check_job, load_pair, set_up
from llmcompress.distillation.student.folder import StudentFolder, open_folder
from llmcompress.distillation.teacher.cache import remove_cache
from llmcompress.distillation.teacher.quantized import check_teacher, silence_bitsandbytes
from llmcompress.errors import NumericsError, Termination
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.config import code_files
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files.identity import content_digest, teacher_digest, tokenizer_digest
from llmcompress.models.files.output import check_writable, claim_folder, clear_folder, lock_output
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import CONTROLS, Control, Distillation, Teacher
from llmcompress.recipe.read import dump, hide_folders, read_as
from llmcompress.runtime.facts import versions
from llmcompress.runtime.memory import keeping_freed_memory
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.progress import progress_line
from llmcompress.runtime.ranks import Ranks, join_ranks
from llmcompress.weight.modules import compressed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTROL = "control"  # the record of a finished control
AROUND = {"controls", "trackers", "save_every", "save_minutes"}  # keys of a recipe that change no state
RUN = "run"  # the record of whose work a folder holds, whatever the records of its phases are called
COMPRESSED_TEACHER = "the teacher is compressed too, so what it lost the student does not learn"


@fast_float32()
@own_accelerate()
def distill(
    student: str | Path,
    teacher: str | Path,
    recipe: Distillation | str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    device: str = "cpu",
    progress: Report | None = None,
    trust_remote_code: bool = False,
) -> DistillationResult:
    """Train the kinds of numbers that `recipe` names in `student` towards `teacher`, and write the result as a folder.

    A compressed student keeps its expressions and its bytes, but for low-rank terms that the recipe adds; a dense one
    keeps its tensors and dtypes. An interrupted run resumes from the last state in `<output>.training`.

    Args:
        student: a folder that compress wrote, or a dense model: a folder, a Hub id or `smollm2`.
        teacher: the dense model that it was made from.
        recipe: a `Distillation`, the path of a YAML file or the name of one that comes along, or plain values.
        output: a new or empty folder.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (step, steps, loss, tokens per second, held-out KL); None for a line in a notebook.
        trust_remote_code: True to run the Python code that both bring along, if transformers lacks their classes.

    Returns:
        The distances to the teacher before and after, the steps, and their cost.

    Raises:
        LLMCompressError: in one sentence, for whatever is wrong.
    """
    progress = progress or progress_line("step", "loss", "tokens/s", "held-out KL")
    recipe, target = read_as(Distillation, recipe), Path(output)
    accelerator = launched_accelerator(device, recipe, target)
    with join_ranks("cpu") as ranks, lock_output(target, "output folder") if ranks.rank == 0 else nullcontext():
        with ranks.agree_on_errors():
            places = [locate(model, trust_remote_code=trust_remote_code) for model in (student, teacher)]
        result = _distill_locked(places[0], places[1], recipe, target, accelerator, ranks, progress)
    for tracker in accelerator.trackers:  # the processes stay together: their program may go on
        tracker.finish()
    return result


def _distill_locked(
    student_place: Place,
    teacher_place: Place,
    recipe: Distillation,
    target: Path,
    accelerator: Accelerator,
    ranks: Ranks,
    progress: Report | None,
) -> DistillationResult:
    """Distil as `distill` says, while no other process writes the output."""
    folder = student_place.folder
    with ranks.agree_on_errors():
        check_student(folder, teacher_place.folder, recipe)
        opened = open_folder(student_place, recipe.nested)
        beside = companions(folder, student_place.trust_remote_code)
        published = hide_folders(recipe)
        known = find_known_text(folder, published)
        check_writable(target, opened.bytes)
        check_vocabularies((student_place, teacher_place))
        tokenizer = load_tokenizer(folder, student_place.trust_remote_code)
        check_teacher(teacher_place, recipe.teacher.bits)
        student, teacher = load_pair(student_place, teacher_place, recipe, accelerator)
    data = _read_data(recipe, tokenizer, teacher, ranks)
    training = target.with_name(target.name + TRAINING)
    identity = _identity(recipe, data, opened, teacher_place)
    ranks.compare(identity | {"recipe": recipe.model_dump(mode="json")})
    store = Store(training, identity)
    ranks.first(lambda: _claim_training(store))
    job = DistillationJob(student_place, teacher_place, recipe, target, data, store, accelerator, ranks)
    with ranks.agree_on_errors():
        check_job(job, student, teacher)
    warnings = [*data.notes, *known, *([COMPRESSED_TEACHER] if compressed_modules(teacher) else [])]
    start_trackers(recipe, accelerator)
    with _note_state(training), advise_on_memory(recipe), silence_bitsandbytes(), keeping_freed_memory():
        run = set_up(job, student, teacher)
        del student, teacher  # so that a teacher which the run does not need is gone
        learned = run_phases(run, progress)
        result = result_of(job, run, learned, opened.layouts, warnings)
        del run
        result = replace(result, controls={name: run_control(job, name, progress) for name in recipe.controls})
    if accelerator.is_main_process:
        write_result(job, opened, beside, learned, dump(published), result)
        store.clear()
        if recipe.teacher.kind == "cached":
            remove_cache(recipe.teacher, target)
    return result


def _claim_training(store: Store) -> None:
    """Make the folder of a run's states, and clear one without finished work. Raises InputError for that of another."""
    claim_folder(store.folder)
    if any(path.suffix in (".json", ".safetensors") and path.stem != RUN for path in store.folder.rglob("*")):
        store.get(RUN)
    else:
        clear_folder(store.folder)  # of metrics
    store.put(RUN, {})


@contextmanager
def _note_state(training: Path) -> Iterator[None]:
    """Say in an interrupt that names nothing yet that the folder `training` keeps finished work, if it does."""
    try:
        yield
    except (KeyboardInterrupt, Termination) as stop:
        if not stop.args and any(training.rglob("*.safetensors")):
            stop.add_note(f"finished work is kept in {training}, from where the same command resumes")
        raise


def _read_data(
    recipe: Distillation, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, ranks: Ranks
) -> Data:
    """Return the data; a text that the teacher has to write is written on its device."""
    return ranks.first(lambda: read_data(recipe.data, tokenizer, lambda: teacher, teacher.config))


def _identity(recipe: Distillation, data: Data, student: StudentFolder, teacher: Place) -> dict[str, Any]:
    """Return what a state depends on: a run continues another if all of this is equal. Models count by content."""
    digests = sha256(json.dumps(student.digests, sort_keys=True).encode()).hexdigest()
    config = [student.folder / name for name in ("config.json", *code_files(student.folder))]
    return {
        "recipe": recipe.model_dump(mode="json", exclude=AROUND),
        "data": data.hash,
        "student": [digests, content_digest(config), tokenizer_digest(student.folder)],
        "teacher": teacher_digest(teacher.folder, teacher.adapter),
        "versions": versions(),
    }


def run_control(job: DistillationJob, name: Control, progress: Report | None) -> dict[str, Any]:
    """Train the same student on the same tokens without a teacher, or by plain forward KL; return the last look at the
    held-out sequences, or {"failed": the sentence} if it diverges.

    With much text and long training, plain forward KL comes near to elaborate losses (arXiv 2305.15781), and text alone
    repairs a part of what compression broke. The distance to these two is the worth of a recipe. The states of a
    control have a folder of their own, and its result stays there until the whole job is done.
    """
    store = job.store.within(f"control-{name}", control=name)
    earlier = job.ranks.first(lambda: None if (record := store.get(CONTROL)) is None else record.entry)
    if earlier is not None:
        return earlier
    job.accelerator.free_memory()  # which keeps the models that it has shared out
    control = replace(job, recipe=control_recipe(job.recipe, name), store=store, tracked=False)
    with job.ranks.agree_on_errors():
        pair = load_pair(job.student_place, job.teacher_place, job.recipe, job.accelerator)  # as the job's own fit
    run = set_up(control, *pair)
    del pair
    try:
        learned = run_phases(run, progress)
        result = {"tokens": learned.tokens, "seconds": learned.seconds, **learned.history[-1]}
    except NumericsError as error:
        result = {"failed": str(error)}
    if job.ranks.rank == 0:
        store.put(CONTROL, result)
    return result


def control_recipe(recipe: Distillation, name: Control) -> Distillation:
    """Return the recipe of a control: as `recipe`, but for its losses, text from the data alone, and no cached or
    quantized teacher if no loss reads one."""
    changes: dict[str, Any] = {"losses": CONTROLS[name], "balance": False, "controls": (), "on_policy": None}
    return recipe.model_copy(update=changes | ({"teacher": Teacher()} if name == "no_teacher" else {}))
