"""Choose, compress, distil: everything a recipe asks for, from the name of a model to the finished checkpoint.

    model, recipe -> job -> steps for its target -> OUT.compressed -> trained towards the same model -> OUT

`compress` and `plan` open the model and read the recipe once; everything below takes the job. Faults in a section or
its text are found before compression starts. OUT.compressed is removed when OUT is complete; an interrupted run resumes
from it with the distillation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.allocation.allocate import Allocation, allocate
from llmcompress.allocation.forecast import forecast
from llmcompress.allocation.price_file import Part, allocate_by, discard_prices, measure_part
from llmcompress.compression import run
from llmcompress.compression.job import Job, prepare
from llmcompress.compression.plan import Plan, plan_of
from llmcompress.compression.result import Result
from llmcompress.compression.run import Progress
from llmcompress.compression.run_files import is_complete, is_of
from llmcompress.compression.time_estimate import estimate_time
from llmcompress.data.text import preview_text
from llmcompress.errors import DiskError, GateError, RecipeError
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.locate import pinned_name
from llmcompress.models.dense.model import resolve
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import has_file, remove_unfinished
from llmcompress.models.files.compressed import check_kind
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.output import (
    check_output_name,
    check_writable,
    disk_errors,
    is_ours,
    lock_output,
    remove_folder,
    staging_of,
)
from llmcompress.pipeline.quality_check import check_gates, is_unsettled, judge
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import hide_folders, read_as, read_recipe
from llmcompress.reporting import report as reports
from llmcompress.runtime.devices import as_current, device_of
from llmcompress.runtime.phases import time_phases
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.progress import progress_line
from llmcompress.runtime.ranks import ALONE, Ranks, join_ranks, process_count

STAGED, PRICES = ".compressed", ".prices.json"  # follow the name of the output folder
Training = Callable[[int, int, float, float, float], None]  # as `distill` reports


def plan(
    model: str | Path,
    recipe: Recipe | str | Path | dict[str, Any],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Return what `compress` would do, from tensor headers alone.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        recipe: a `Recipe`, the path of a YAML file, or plain values.
        revision: a branch, tag or commit of a Hub model.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The steps, bits and sizes of every layer, and estimates for this machine: peak memory, and time once asked. For
        a recipe with a `target:`, whose steps `compress` chooses by measuring, steps that spend its bits evenly.

    Raises:
        InputError: for a model that cannot be compressed.
        RecipeError: for whatever is wrong with the recipe, and for a `target:` that no choice of options reaches.
    """
    job = _open_job(model, recipe, revision, trust_remote_code)
    texts = () if job.recipe.distill is None else job.recipe.distill.texts()
    for text in texts if job.recipe.calibration is None else (job.recipe.calibration, *texts):
        preview_text(text)
    if job.recipe.target is not None:
        return forecast(job)
    return replace(plan_of(job), timed=partial(estimate_time, job))


@fast_float32()
def compress(
    model: str | Path,
    recipe: Recipe | str | Path | dict[str, Any],
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    pricing: Progress | None = None,
    training: Training | None = None,
    judging: Callable[[int, int], None] | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
) -> Result:
    """Compress a dense causal language model according to a recipe.

    If the recipe has a `target:`, steps for the layers without a rule are chosen first. If it has a `distill:` section,
    the output is the distilled model. Processes that a launcher started share the work; every one has to call this.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        recipe: a `Recipe`, the path of a YAML file, or plain values.
        output: a new or empty folder; None for a temporary one, see `Result.save`.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (blocks compressed, blocks, tokens per second). Where it or one of the next three is None, a
            notebook shows a line, and nothing else does.
        pricing: receives the same while options are priced for a target.
        training: receives (step, steps, loss, tokens per second, held-out KL) of a distillation.
        judging: receives (blocks read, blocks in both models) while the result is held against the recipe's gates.
        resume: False to start over instead of resuming an interrupted run.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The finished checkpoint and its report.

    Raises:
        GateError: for a result outside of the recipe's gates, which is the error's `result`. It is complete in
            `output`, and its report says so.
        LLMCompressError: in one sentence, for whatever is wrong. What is left behind then is only what the same call
            resumes from: finished blocks in `<output>.partial`, prices in `<output>.prices.json`, a compressed model in
            `<output>.compressed` and the state of its training in `<output>.training`.
    """
    device_of(device := str(device))  # before a model is looked at
    progress = progress or progress_line("block", "tokens/s")
    pricing = pricing or progress_line("priced block", "tokens/s")
    training = training or progress_line("step", "loss", "tokens/s", "held-out KL")
    judging = judging or progress_line("block read for the gates")
    with join_ranks(device) as ranks, as_current(device_of(ranks.device)), time_phases():
        with ranks.agree_on_errors():
            if output is not None:
                check_output_name(Path(output))
            job = _open_job(model, recipe, revision, trust_remote_code)
        finish = partial(
            compress_job, device=ranks.device, progress=progress, training=training, resume=resume, ranks=ranks
        )
        way, place = _RunOptions(finish, judging, resume, ranks), None if output is None else Path(output)
        if job.recipe.target is None:
            return _judge_result(_reuse_or_run(job, place, way), job, way)
        return _run_to_target(job, place, pricing, way)


def _open_job(
    model: str | Path, recipe: Recipe | str | Path | dict[str, Any], revision: str | None, trust_remote_code: bool
) -> Job:
    """Read the recipe and lay it over the opened model."""
    parsed = read_recipe(recipe)
    source = resolve(model, revision, trust_remote_code)
    companions(source.folder, trust_remote_code)  # raises any fault in them before work starts
    return prepare(source, parsed)


def price_part(
    model: str | Path,
    recipe: Recipe | str | Path | dict[str, Any],
    output: Path,
    part: Part,
    *,
    revision: str | None = None,
    device: str = "cpu",
    pricing: Progress | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Measure a part of the prices that `compress` would measure for its target, and return the file beside `output`.

    `compress` joins all parts. Raises what `compress` raises.
    """
    place = device_of(device)
    if (count := process_count()) > 1:
        raise RecipeError(f"a part of the prices is measured by one process, and there are {count}; start one for it")
    job = _open_job(model, recipe, revision, trust_remote_code)
    check_writable(output, 0)
    with fast_float32(), as_current(place):
        return measure_part(output.with_name(output.name + PRICES), part, job, device=device, progress=pricing)


@dataclass(frozen=True)
class _RunOptions:
    """Settings of a run without a target: `finish` makes its checkpoint, `judging` receives the progress of gates."""

    finish: Callable[[Job, Path | None], Result]
    judging: Callable[[int, int], None] | None
    resume: bool
    ranks: Ranks


def _reuse_or_run(job: Job, output: Path | None, way: _RunOptions) -> Result:
    """Return the job's checkpoint: that of an earlier run if only its gates are unsettled, else a new one."""

    def reuse() -> Result | None:
        if not way.resume or output is None or output.with_name(output.name + STAGED).is_dir():
            return None
        if (output / MANIFEST).is_file():
            with lock_output(output, "output folder"), disk_errors(output, "make the folder writable"):
                remove_unfinished(output)
        return completed_result(output, job, way.ranks.requested_device) if is_unsettled(output, job.recipe) else None

    return way.ranks.first(reuse) or way.finish(job, output)


def _judge_result(result: Result, job: Job, way: _RunOptions, plan: Allocation | None = None) -> Result:
    """Measure a finished checkpoint for the recipe's gates, and return it with its new report.

    Raises GateError in all processes if it misses a gate.
    """
    ranks, stays = way.ranks, result.is_kept
    with ExitStack() as stack:
        if stays:
            stack.push(partial(attach_note, f"{result.folder} is complete, and the same command measures its gates"))
            ranks.first(lambda: stack.enter_context(lock_output(result.folder, "output folder")))
        report = judge(job, result.folder, ranks.device, way.judging, plan, ranks)
    judged = replace(result, report=report)
    try:
        with ranks.agree_on_errors():
            check_gates(report, result.folder, plan, stays)
    except GateError as error:
        error.result = judged  # a temporary folder lives as long as this
        raise
    return judged


def _run_to_target(job: Job, output: Path | None, pricing: Progress | None, way: _RunOptions) -> Result:
    """Choose steps for the job's target, and do the resulting job. Its prices and its plan lie beside the report."""
    ranks = way.ranks
    device = ranks.device
    with ranks.agree_on_errors():
        run.check_ranks(job, ranks, output)
    if output is None:
        plan = allocate(job, device=device, progress=pricing)
        result = way.finish(plan.settled, None)
        allocation = record_allocation(plan, result.folder, device)
        return _judge_result(replace(result, allocation=allocation), plan.settled, way, plan)
    prices = output.with_name(output.name + PRICES)
    with ExitStack() as stack:
        ranks.first(lambda: _begin_pricing(stack, prices, output, way.resume))
        plan = allocate_by(prices, job, device=device, progress=pricing, ranks=ranks)
    settled = plan.settled
    with ExitStack() as stack:
        stack.push(partial(attach_note, f"the prices of the options are kept in {prices}"))
        done = ranks.first(lambda: completed_result(output, settled, ranks.requested_device))
        result = done or way.finish(settled, output)
        allocation = ranks.first(lambda: record_allocation(plan, result.folder, device))
        result = _judge_result(replace(result, allocation=allocation), settled, way, plan)
    ranks.first(prices.unlink)
    return result


def _begin_pricing(stack: ExitStack, prices: Path, output: Path, resume: bool) -> None:
    """Check the output and lock it until `stack` ends; discard the file `prices` unless this is to `resume`."""
    nearly_done = resume and prices.is_file() and (output / file_names.REPORT).is_file()  # all but the plan
    if not nearly_done:
        check_writable(output, 0)
    stack.enter_context(lock_output(output, "output folder"))
    if not resume:
        discard_prices(prices)


def attach_note(sentence: str, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    """Attach `sentence` as a note to an exception that leaves the context."""
    if error is not None:
        error.add_note(sentence)


def record_allocation(plan: Allocation, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Measure the finished checkpoint in `folder`, and write its plan and the measurement there.

    Removes an earlier plan or scores that the manifest lacks. Raises DiskError if the folder cannot be written to.
    """
    for name in (file_names.ALLOCATION, file_names.SCORES):
        if not has_file(folder, name):
            with disk_errors(folder / name):
                (folder / name).unlink(missing_ok=True)
    summary = plan.summary(plan.measure_kl(folder, device), reports.read(folder).bytes)
    plan.write(folder, summary)
    return summary


def compress_job(
    job: Job,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    training: Training | None = None,
    resume: bool = True,
    ranks: Ranks = ALONE,
) -> Result:
    """Compress an opened job without a target, and distil the result if the recipe says so."""
    wanted, source = job.recipe.distill, job.source
    if wanted is None:
        return run.compress(job, output, device=device, progress=progress, resume=resume, ranks=ranks)
    with ranks.agree_on_errors():
        run.check_ranks(job, ranks, output)
    from llmcompress.data.distillation import read_data
    from llmcompress.distillation.requirements import check_requirements
    from llmcompress.distillation.run import distill
    from llmcompress.distillation.teacher.quantized import check_teacher

    check_requirements(wanted, device)
    check_teacher(source.place, wanted.teacher.bits)
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmcompress-")
        output = Path(temporary.name) / "model"
    target = Path(output)
    first = job.undistilled
    staged = target.with_name(target.name + STAGED)
    may_be_done = resume and staged.is_dir() and (target / file_names.REPORT).is_file()
    if may_be_done and (result := completed_result(target, job, device)) is not None:  # an earlier run just ended
        return result
    check_writable(target, 2 * plan_of(first).bytes, [staged, staging_of(staged)])
    if not resume or not (staged / file_names.REPORT).is_file():  # or its removal was interrupted
        with lock_output(target, "output folder"), lock_output(staged, "output folder"):  # no other process trains it
            _discard_beside(target)
    if completed_result(staged, first, device) is None:
        if all(text.dataset != "self" for text in wanted.texts()):  # the model would have to write that text first
            read_data(wanted.data, source.tokenizer(), source.load, source.config)  # raises any fault in the data
        run.compress(first, staged, device=device, progress=progress, resume=resume)
    teacher = pinned_name(source.name, source.hub_id, source.revision)
    trust = source.trust_remote_code
    with ExitStack() as stack:
        if temporary is None:
            stack.push(
                partial(attach_note, f"the compressed model is kept in {staged}, from where the same command resumes")
            )
        done = distill(staged, teacher, wanted, target, device=device, progress=training, trust_remote_code=trust)
    _discard_beside(target)
    return Result(target, reports.read(target), temporary, done.to_json())


def completed_result(output: Path, job: Job, device: str) -> Result | None:
    """Return the result of this job if an earlier run has completed it in `output`, None if nothing is there.

    Raises DiskError for the output of another job, InputError for a folder that is no checkpoint, or damaged.
    """
    if not is_complete(output, job, device):
        return None
    path = output / file_names.DISTILLATION_RECIPE
    taught = read_as(Distillation, path) if path.is_file() else None
    wanted = None if job.recipe.distill is None else hide_folders(job.recipe.distill)
    if taught != wanted:
        raise DiskError(f"{output} was distilled with another recipe; remove it, or choose another output folder")
    with lock_output(output, "output folder") as staging:  # the earlier run may have ended before removing all this
        if is_ours(staging):
            remove_folder(staging)
        staged = output.with_name(output.name + STAGED)
        whole = (staged / file_names.REPORT).is_file()
        if wanted is not None and (not whole or is_of(staged, job.undistilled, device)):
            _discard_beside(output)
    return Result(output, reports.read(output), distillation=reports.read_distillation(output))


def _discard_beside(output: Path) -> None:
    """Remove what `output` was distilled from, and the state of that training. Raises what `_discard` raises."""
    from llmcompress.distillation.context import TRAINING

    _discard(output.with_name(output.name + STAGED), output.with_name(output.name + TRAINING))


def _discard(staged: Path, training: Path) -> None:
    """Remove what an earlier run left. Raises DiskError for folders that are not ours."""
    if staged.is_dir():
        remove_checkpoint(staged)
    if is_ours(training):
        remove_folder(training)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint of ours, so that what a kill leaves is known as the rest of one."""
    if any(folder.iterdir()):
        check_kind(folder)
    (folder / file_names.REPORT).unlink(missing_ok=True)  # first, since without it nothing resumes from the rest
    remove_folder(folder, "config.json")
