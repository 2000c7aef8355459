"""From a model to what an engine loads, in one run: compress, then export.

    model, recipe -> OUT.checkpoint -> OUT.export -> OUT, with the report and the recipe

`OUT.checkpoint` is a compressed checkpoint of ours, which an interrupted run resumes and which goes when OUT is
complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.allocation.allocate import CHOICE_KEYS
from llmcompress.allocation.file_sizes import SIZED, plan_in_files
from llmcompress.allocation.target_formats import check_rules, check_source
from llmcompress.compression.job import Job, prepare
from llmcompress.compression.plan import TABLE_HINT, Plan, plan_of
from llmcompress.compression.result import Result
from llmcompress.errors import DiskError, GateError, RecipeError
from llmcompress.formats.engine_files import ExportReport
from llmcompress.formats.export import export
from llmcompress.models.dense.model import resolve
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import files_of, write_checkpoint
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.output import (
    check_writable,
    claim_folder,
    clear_folder,
    is_ours,
    lock_output,
    remove_folder,
)
from llmcompress.models.files.reading import read_json
from llmcompress.pipeline.compress import STAGED, attach_note, completed_result, compress, plan, remove_checkpoint
from llmcompress.pipeline.quality_check import is_unsettled
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.target import EXPORTS
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import Report
from llmcompress.runtime.ranks import process_count
from llmcompress.weight.runtime_formats import WITH_TABLES

CHECKPOINT, EXPORT = ".checkpoint", ".export"  # follow the name of the output folder


@dataclass(frozen=True)
class Engine:
    """An engine. `form`: the export that it loads, None for our own files; `recipe`: what it gets if none is named."""

    form: str | None
    recipe: str


ENGINES = {
    "vllm": Engine(EXPORTS["vllm"], "vllm-4"),
    "llama.cpp": Engine(EXPORTS["llama.cpp"], "llama-cpp-4"),
    "mlx": Engine(EXPORTS["mlx"], "mlx-4"),
    "exllamav3": Engine(EXPORTS["exllamav3"], "exl3"),
    "transformers": Engine(None, "default"),
    "transformers-cuda": Engine(None, "default"),
}


def engine_of(name: str) -> Engine:
    """Return an engine by its name. Raises RecipeError for an unknown one."""
    if name not in ENGINES:
        near = get_close_matches(name.lower(), ENGINES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(ENGINES)}"
        raise RecipeError(f"there is no engine {name!r}; {hint}")
    return ENGINES[name]


def aim_at(engine: str, wanted: Recipe) -> Recipe:
    """Return a recipe whose target, if it has one, has only forms that the engine multiplies.

    Raises RecipeError for an unknown engine, and for a target of zeros.
    """
    engine_of(engine)
    if wanted.target is None:
        return wanted
    if wanted.target.sparsity is not None:
        raise RecipeError(f"{engine} has no form for a share of zeros; give a size or a quality, or leave --for out")
    return wanted.model_copy(update={"target": wanted.target.for_engine(engine)})


def plan_for(
    engine: str, model: str | Path, recipe: Recipe, revision: str | None = None, trust_remote_code: bool = False
) -> Plan:
    """Do as `plan`, with the sizes of the engine's files if known. Raises RecipeError for what it cannot hold, too."""
    aimed = aim_at(engine, recipe)
    job = _open_job(engine, model, aimed, revision, trust_remote_code)
    planned = plan(model, aimed, revision, trust_remote_code)
    if engine in SIZED and aimed.target is None:  # a forecast counts the engine's files
        planned = plan_in_files(planned, job, SIZED[engine](job))
    is_ours = ENGINES[engine].form is None
    return planned if is_ours else replace(planned, warnings=_mend_hints(engine, planned.warnings))


def compress_for(
    engine: str, model: str | Path, recipe: Recipe, output: Path, *, resume: bool = True, **options: Any
) -> Result:
    """Compress a model, and write what an engine loads into `output`, beside the report and the recipe.

    Args:
        engine: vllm, llama.cpp, mlx, exllamav3, or transformers and transformers-cuda, which run our own files.
        model, recipe: see `compress`.
        output: a new or empty folder.
        resume: False to start over instead of resuming an interrupted run.
        options: of `compress`.

    Returns:
        The result, whose report has the sizes of the engine's file, and what the export changed among its warnings.

    Raises:
        RecipeError: before any work, for forms that the engine cannot hold.
        GateError: for a result outside of the recipe's gates. It is complete in `output`.
        LLMCompressError: for whatever else is wrong, as `compress` and `export` do.
    """
    form = engine_of(engine).form
    if process_count() > 1 and form is not None:
        raise RecipeError("one process writes for an engine; compress with several, then export by one")
    trust = options.get("trust_remote_code", False)
    aimed = aim_at(engine, recipe)
    job = _open_job(engine, model, aimed, options.get("revision"), trust)
    if form is None:
        return compress(model, aimed, output, resume=resume, **options)
    check_writable(output, 0)
    if aimed.target is None:
        ends = (CHECKPOINT, f"{CHECKPOINT}.partial", f"{CHECKPOINT}{STAGED}", EXPORT)
        check_writable(output, _bytes_to_write(engine, job), [output.with_name(output.name + end) for end in ends])
    staging = output.with_name(output.name + EXPORT)
    is_ours(staging)  # raises now what would be in the way later
    with lock_output(staging, "output folder"):
        return _compress_and_export(engine, form, job, model, output, resume, options)


def _bytes_to_write(engine: str, job: Job) -> int:
    """Return the bytes of checkpoint and export, which lie side by side at the end."""
    planned = plan_of(job)
    return planned.bytes + plan_in_files(planned, job, SIZED[engine](job)).bytes


def _compress_and_export(
    engine: str, form: str, job: Job, model: str | Path, output: Path, resume: bool, options: dict[str, Any]
) -> Result:
    """Do as `compress_for` for an engine with files of its own, whose job is checked and whose output is locked."""
    ours, failure, trust = output.with_name(output.name + CHECKPOINT), None, options.get("trust_remote_code", False)
    if ours.is_dir() and not (resume and (ours / file_names.REPORT).is_file()):  # or its removal was interrupted
        remove_checkpoint(ours)
    try:
        result = _finished_result(ours, job, options.get("device", "cpu")) or compress(
            model, job.recipe, ours, resume=resume, **options
        )
    except GateError as error:
        failure, result = error, Result(ours, reports.read(ours))
    staging = output.with_name(output.name + EXPORT)
    claim_folder(staging)
    clear_folder(staging)
    with ExitStack() as stack:
        stack.push(
            partial(attach_note, f"the compressed model is kept in {ours}, and the same command goes on from there")
        )
        done = export(ours, staging / "model", form, trust_remote_code=trust)
    settled = job
    if job.recipe.target is not None:
        written = read_recipe(ours / file_names.RECIPE)  # without what came after
        settled = job.with_recipe(written.model_copy(update={"distill": job.recipe.distill}))
    report = _engine_report(result.report, done, engine, settled)
    with write_checkpoint(output) as writer:
        for name in files_of(staging / "model"):
            if name != MANIFEST:
                (writer.folder / name).parent.mkdir(exist_ok=True)
                os.replace(staging / "model" / name, writer.folder / name)
        writer.write(file_names.REPORT, json.dumps(report.to_json(), indent=2))
        writer.write(file_names.RECIPE, (ours / file_names.RECIPE).read_text(encoding="utf-8"))
    remove_folder(staging)
    remove_checkpoint(ours)
    allocation = result.allocation and result.allocation | {"measured_bytes": report.bytes}
    finished = replace(result, folder=output, report=report, allocation=allocation)
    if failure is None:
        return finished
    missed = GateError(str(failure).replace(str(ours), str(output)))
    missed.result = finished
    raise missed from failure


def _open_job(engine: str, model: str | Path, recipe: Recipe, revision: str | None, trust_remote_code: bool) -> Job:
    """Return the job. Raises RecipeError for steps whose outcome the engine cannot hold, InputError for a model that it
    does not run."""
    job = prepare(resolve(model, revision, trust_remote_code), recipe)
    check_rules(job, engine)
    if recipe.target is None:  # for one, it is checked where options are laid
        check_source(job, engine)
    return job


def _finished_result(folder: Path, job: Job, device: str) -> Result | None:
    """Return the result of this job in `folder`, None if it is to be made. Raises DiskError for that of another."""
    target = job.recipe.target
    if is_unsettled(folder, job.recipe):  # `compress` takes it up, and judges it
        return None
    if target is None or not (folder / file_names.ALLOCATION).is_file():
        return None if target else completed_result(folder, job, device)
    before = job.recipe.model_dump(mode="json", include=set(CHOICE_KEYS))
    if read_json(folder / file_names.ALLOCATION).get("asked") != before:
        raise DiskError(
            f"{folder} was made for another target, or from other rules or options; remove it, or choose another "
            f"output folder"
        )
    written = read_recipe(folder / file_names.RECIPE)  # the steps that met its target
    settled = job.recipe.model_copy(update={key: getattr(written, key) for key in CHOICE_KEYS})
    return completed_result(folder, job.with_recipe(settled), device)


def _engine_report(report: Report, done: ExportReport, engine: str, job: Job) -> Report:
    """Return the report with the sizes of the engine's files, and what the export changed among its warnings."""
    planned, size = plan_in_files(plan_of(job), job, SIZED[engine](job)), done.bytes_after
    there = {row.name: row for row in planned.layers}
    rows = (replace(row, bpw=there[row.name].bpw, stored=there[row.name].description) for row in report.layers)
    notes, model_bpw = _mend_hints(engine, (*report.warnings, *done.changed)), size * 8 / report.parameters
    return replace(report, bytes=size, bpw=planned.bpw, model_bpw=model_bpw, layers=tuple(rows), warnings=notes)


def _mend_hints(engine: str, notes: Iterable[str]) -> tuple[str, ...]:
    """Return warnings without steps for token tables, which are those for our files, and with what the engine reads."""
    way = f"steps that {engine} reads compress them" if engine in WITH_TABLES else f"{engine} reads tables as they are"
    return tuple(f"{note.partition(TABLE_HINT)[0]}; {way}" if TABLE_HINT in note else note for note in notes)
