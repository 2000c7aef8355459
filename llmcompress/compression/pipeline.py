"""Choose, compress, distil: everything a recipe asks for, from the name of a model to the finished checkpoint.

    model, recipe -> job -> steps for its target -> OUT.compressed -> trained towards the same model -> OUT

`compress` and `plan` are the entry points: they open the model and read the recipe once, and everything below takes the
job. Any fault in a section or its text is found before compression starts. OUT.compressed is removed when OUT is
complete; if a run is interrupted, the next one finds it and resumes with the distillation.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.compression import run
from llmcompress.compression.allocate.plan import Allocation, allocate
from llmcompress.compression.allocate.price_file import allocate_by
from llmcompress.compression.journal import is_older
from llmcompress.compression.plan import Job, Plan, prepare
from llmcompress.compression.result import Result
from llmcompress.compression.run import Progress
from llmcompress.errors import DiskError, RecipeError
from llmcompress.evaluate import report as reports
from llmcompress.models import file_names
from llmcompress.models.checkpoint import check_output, locked
from llmcompress.models.companions import companions
from llmcompress.models.dense import resolve
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.published import published
from llmcompress.recipe.read import read_recipe
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.versions import versions

STAGED, PRICES = ".compressed", ".prices.json"  # follow the name of the output folder
Training = Callable[[int, int, float, float, float], None]  # as `distill` reports


def plan(model: str | Path, recipe: Recipe | str | Path | dict[str, Any], revision: str | None = None) -> Plan:
    """Return what `compress` would do, from tensor headers alone.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        recipe: a `Recipe`, the path of a YAML file, or plain values.
        revision: a branch, tag or commit of a Hub model.

    Returns:
        The steps, bits and sizes of every layer, and estimates of time and peak memory for this machine.

    Raises:
        InputError: for a model that cannot be compressed.
        RecipeError: for whatever is wrong with the recipe, and for one with a `target:`, which only `compress` meets.
    """
    return _opened(model, recipe, revision).plan


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
    resume: bool = True,
) -> Result:
    """Compress a dense causal language model according to a recipe.

    If the recipe has a `target:`, steps for the layers without a rule are chosen first. If it has a `distill:` section,
    the output is the distilled model.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        recipe: a `Recipe`, the path of a YAML file, or plain values.
        output: a new or empty folder; None for a temporary one, see `Result.save`.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (blocks compressed, blocks, tokens per second).
        pricing: receives the same while options are priced for a target.
        training: receives (step, steps, loss, tokens per second, held-out KL) of a distillation.
        resume: False to start over instead of resuming an interrupted run.

    Returns:
        The finished checkpoint and its report.

    Raises:
        LLMCompressError: in one sentence, for whatever is wrong. What is left behind then is only what the same call
            resumes from: finished blocks in `<output>.partial`, prices in `<output>.prices.json`, a compressed model in
            `<output>.compressed` and the state of its training in `<output>.training`.
    """
    device_of(device)  # before a model is looked at
    job = _opened(model, recipe, revision)
    finish = partial(compress_job, device=device, progress=progress, training=training, resume=resume)
    if job.recipe.target is None:
        return finish(job, output)
    return _to_target(job, None if output is None else Path(output), device, pricing, resume, finish)


def _opened(model: str | Path, recipe: Recipe | str | Path | dict[str, Any], revision: str | None) -> Job:
    """Read the recipe and lay it over the opened model."""
    asked = read_recipe(recipe)
    source = resolve(str(model), revision)
    companions(source.folder)  # raises any fault in them before work starts
    return prepare(source, asked)


def _to_target(
    job: Job,
    output: Path | None,
    device: str,
    pricing: Progress | None,
    resume: bool,
    finish: Callable[[Job, Path | None], Result],
) -> Result:
    """Choose steps for the job's target, and `finish` the resulting job. Its prices and its plan lie beside the
    report."""
    if output is None:
        plan = allocate(job, device=device, progress=pricing)
        result = finish(plan.settled, None)
        return replace(result, allocation=record(plan, result.folder, device))
    check_output(output, 0)
    kept = output.with_name(output.name + PRICES)
    with locked(output, "output folder"):
        if not resume:
            kept.unlink(missing_ok=True)
        plan = allocate_by(kept, job, device=device, progress=pricing)
    with ExitStack() as stack:
        stack.push(partial(_note, f"the prices of the options are kept in {kept}"))
        result = finish(plan.settled, output)
    kept.unlink()
    return replace(result, allocation=record(plan, result.folder, device))


def _note(sentence: str, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    """Attach `sentence` as a note to an exception that leaves the context."""
    if error is not None:
        error.add_note(sentence)


def record(plan: Allocation, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Measure the finished checkpoint in `folder` against its plan, and keep both there. Raises DiskError if the folder
    cannot be written to."""
    found = plan.summary(plan.measured(folder, device), reports.read(folder).bytes)
    plan.keep(folder, found)
    return found


def compress_job(
    job: Job,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    training: Training | None = None,
    resume: bool = True,
) -> Result:
    """Compress an opened job without a target, and distil the result if the recipe says so."""
    wanted, source = job.recipe.distill, job.source
    if wanted is None:
        return run.compress(job, output, device=device, progress=progress, resume=resume)
    from llmcompress.data.distillation import read_data
    from llmcompress.distill.ready import check_ready
    from llmcompress.distill.run import TRAINING, distill

    check_ready(wanted, device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "compressing runs in one process; compress without distill: first, then start llmcompress distill in many"
        )
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmcompress-")
        output = Path(temporary.name) / "model"
    target = Path(output)
    first = replace(job, recipe=job.recipe.model_copy(update={"distill": None}))
    check_output(target, 2 * first.plan.bytes)
    staged = target.with_name(target.name + STAGED)
    if not resume:
        for left in (staged, target.with_name(target.name + TRAINING)):
            shutil.rmtree(left, ignore_errors=True)
    if not is_there(staged, first):
        if all(text.dataset != "self" for text in wanted.texts()):  # the model would have to write that text first
            read_data(wanted.data, source.tokenizer(), source.load, source.config)  # raises any fault in the data
        run.compress(first, staged, device=device, progress=progress, resume=resume)
    teacher = source.name if source.revision is None else f"{source.name}@{source.revision}"
    done = distill(staged, teacher, wanted, target, device=device, progress=training)
    shutil.rmtree(staged)
    return Result(target, reports.read(target), temporary, done.to_json())


def is_there(staged: Path, job: Job) -> bool:
    """True if an earlier run has finished this job in `staged`. Raises DiskError if it finished another one there."""
    if not staged.is_dir() or not any(staged.iterdir()):
        return False
    found = reports.read(staged)
    before = (read_recipe(staged / file_names.RECIPE), found.model, found.revision, found.versions)
    then = (staged / file_names.REPORT).stat().st_mtime
    now = (published(job.recipe), job.source.public_name, job.source.revision, versions())
    if before != now or is_older(then, job.source, job.recipe.calibration):
        raise DiskError(
            f"{staged} was left by a run with another recipe, model, text or version; remove it, or choose another "
            f"output folder"
        )
    return True
