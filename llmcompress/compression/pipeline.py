"""Choose, compress, distil: what a recipe with a `target:` or a section `distill:` asks for, from a Hub id to the
finished checkpoint.

    model, recipe with a target -> recipe -> OUT.compressed -> trained towards the same model -> OUT

What is wrong with the section or its text is found before anything is compressed. OUT.compressed goes when OUT is
there; a run that was cut finds it, and goes on with the distillation.
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
from typing import TYPE_CHECKING, Any

from llmcompress.compression import run
from llmcompress.compression.allocate.plan import Allocation, allocate
from llmcompress.compression.allocate.price_file import allocate_by
from llmcompress.compression.journal import is_older
from llmcompress.compression.plan import Plan, plan_of, prepare
from llmcompress.compression.result import Result
from llmcompress.compression.run import Progress
from llmcompress.data.calibration import check_length
from llmcompress.distill.blockwise.tune import Tune
from llmcompress.errors import DiskError, RecipeError
from llmcompress.evaluate import report as reports
from llmcompress.models import file_names
from llmcompress.models.checkpoint import check_output, locked
from llmcompress.models.dense import DenseModel, load_model, resolve
from llmcompress.models.locate import Place
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import read_recipe, section
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.versions import versions

if TYPE_CHECKING:
    from llmcompress.recipe.distillation import Distillation
    from llmcompress.recipe.reconstruction import Reconstruction

STAGED, PRICES = ".compressed", ".prices.json"  # follow the name of the output folder
Training = Callable[[int, int, float, float, float], None]  # as `distill` reports


def plan(model: str | Path, recipe: Recipe | str | Path | dict[str, Any], revision: str | None = None) -> Plan:
    """What `compress` would do, from headers alone. Raises InputError and RecipeError as it would."""
    asked = read_recipe(recipe)
    dense = resolve(str(model), revision)
    found = plan_of(prepare(dense, asked))
    blocks = None if asked.reconstruct is None else _reconstruction(asked).model_dump(mode="json")
    then = None if asked.distill is None else wanted_distillation(asked, dense).model_dump(mode="json")
    return replace(found, reconstruction=blocks, distillation=then)


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
    """Compresses a dense causal LM (folder, Hub id or `smollm2`) as `recipe` says, into the new folder `output`; with a
    section `distill:`, what lands there has learned from the dense model again. With a `target:`, the steps of what no
    rule speaks of are chosen first, which `pricing` reports.

    Raises an LLMCompressError, in one sentence, for whatever is wrong; then nothing is left behind, but for finished
    blocks in `<output>.partial`, what a target was chosen by in `<output>.prices.json`, and with a section its finished
    compression in `<output>.compressed` and its training in `<output>.training`, from where the same call goes on;
    without `resume` it begins anew.
    """
    device_of(device)  # before a model is looked at
    asked = read_recipe(recipe)
    if asked.target is not None:
        then: dict[str, Any] = {"progress": progress, "training": training, "resume": resume}
        return _to_target(model, asked, output, revision, device, pricing, then)
    how: dict[str, Any] = {"device": device, "progress": progress, "tune": _tuner(asked), "resume": resume}
    if asked.distill is None:
        return run.compress(model, asked, output, revision=revision, **how)
    from llmcompress.data.distillation import read_data
    from llmcompress.distill.ready import check_ready
    from llmcompress.distill.run import TRAINING, distill

    dense = resolve(str(model), revision)
    wanted = wanted_distillation(asked, dense)
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
    first = asked.model_copy(update={"distill": None})
    check_output(target, 2 * plan_of(prepare(dense, first)).bytes)
    staged = target.with_name(target.name + STAGED)
    if not resume:
        for left in (staged, target.with_name(target.name + TRAINING)):
            shutil.rmtree(left, ignore_errors=True)
    if not is_there(staged, first, dense):
        if all(text.dataset != "self" for text in _texts(wanted)):  # which the model would have to write
            load = partial(load_model, Place(dense.name, dense.folder))
            read_data(wanted.data, dense.tokenizer(), load, dense.config)  # raises what is wrong with it
        run.compress(dense.name, first, staged, revision=dense.revision, **how)
    teacher = dense.name if dense.revision is None else f"{dense.name}@{dense.revision}"
    done = distill(staged, teacher, wanted, target, device=device, progress=training)
    shutil.rmtree(staged)
    return Result(target, reports.read(target), temporary, done.to_json())


def _to_target(
    model: str | Path,
    asked: Recipe,
    output: str | Path | None,
    revision: str | None,
    device: str,
    pricing: Progress | None,
    then: dict[str, Any],
) -> Result:
    """The whole of it for a recipe with a target; its price list and its plan lie beside the report."""
    dense = resolve(str(model), revision)
    check_sections(asked, dense)
    if output is None:
        plan = allocate(dense, asked, device=device, progress=pricing)
        result = compress(model, plan.recipe, None, revision=revision, device=device, **then)
        return replace(result, allocation=record(plan, result.folder, device))
    target = Path(output)
    check_output(target, 0)
    kept = target.with_name(target.name + PRICES)
    with locked(target, "output folder"):
        if not then["resume"]:
            kept.unlink(missing_ok=True)
        plan = allocate_by(kept, dense, asked, device=device, progress=pricing)
    with ExitStack() as stack:
        stack.push(partial(_note, f"what the options cost is kept in {kept}"))
        result = compress(model, plan.recipe, target, revision=revision, device=device, **then)
    kept.unlink()
    return replace(result, allocation=record(plan, result.folder, device))


def _note(sentence: str, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    """What an error that leaves a context says besides."""
    if error is not None:
        error.add_note(sentence)


def record(plan: Allocation, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Measures the finished checkpoint in `folder` beside its plan, and leaves both there. Raises DiskError if that
    cannot be."""
    found = plan.summary(plan.measured(folder, device), reports.read(folder).bytes)
    plan.keep(folder, found)
    return found


def check_sections(recipe: Recipe, dense: DenseModel) -> None:
    """Raises RecipeError for what is wrong with the sections `reconstruct:` and `distill:`."""
    if recipe.distill is not None:
        wanted_distillation(recipe, dense)
    if recipe.reconstruct is not None:
        _reconstruction(recipe)


def wanted_distillation(recipe: Recipe, dense: DenseModel) -> Distillation:
    """The section `distill:`. Raises RecipeError for what is wrong with it, or with it and this model."""
    from llmcompress.distill.check_fused import check_fused
    from llmcompress.recipe.distillation import Distillation

    found = section(recipe, "distill", Distillation)
    check_fused(recipe.fuse, found)
    for text in _texts(found):
        check_length(text.length, dense.config)
    return found


def _tuner(recipe: Recipe) -> Tune | None:
    """How blocks learn, where the recipe says so. Raises RecipeError for what is wrong with the section."""
    if recipe.reconstruct is None:
        return None
    from llmcompress.distill.blockwise.tune import tuner

    return tuner(_reconstruction(recipe))


def _reconstruction(recipe: Recipe) -> Reconstruction:
    """The section `reconstruct:`. Raises RecipeError for what is wrong with it."""
    from llmcompress.recipe.reconstruction import Reconstruction

    return section(recipe, "reconstruct", Reconstruction)


def _texts(asked: Distillation) -> tuple[Calibration, ...]:
    return asked.data if isinstance(asked.data, tuple) else (asked.data,)


def is_there(staged: Path, recipe: Recipe, dense: DenseModel) -> bool:
    """Whether an earlier run has compressed this model already. Raises DiskError where it compressed something else."""
    if not staged.is_dir() or not any(staged.iterdir()):
        return False
    found = reports.read(staged)
    before = (read_recipe(staged / file_names.RECIPE), found.model, found.revision, found.versions)
    then = (staged / file_names.REPORT).stat().st_mtime
    if before != (recipe, dense.name, dense.revision, versions()) or is_older(then, dense, recipe.calibration):
        raise DiskError(
            f"{staged} was left by a run with another recipe, model, text or version; remove it, or choose another "
            f"output folder"
        )
    return True
