"""Controls of a distillation: the same student on the same tokens, taught by nobody or by plain forward KL.

With much text and long training, plain forward KL comes near to elaborate losses (arXiv 2305.15781), and text alone
repairs a part of what compression broke. What a recipe is worth is its distance to these two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmcompress.distillation.context import Report
from llmcompress.distillation.metrics import Metrics
from llmcompress.distillation.resume import METRICS
from llmcompress.distillation.setup import DistillationJob, learned_from, load_pair, taught
from llmcompress.errors import NumericsError
from llmcompress.recipe.distillation import CONTROLS, Control, Distillation, Teacher

DONE = "control"  # the record of a finished one


def measured_controls(job: DistillationJob, progress: Report | None) -> dict[str, dict[str, Any]]:
    """Run the controls that the recipe names; return the last look of each at the held-out sequences, by name.

    Each keeps its states in a folder of its own, and what it came to stays until the whole job is done, so a resumed
    job does not repeat it. One that diverges is reported as {"failed": the sentence}.
    """
    return {name: _measured(job, name, progress) for name in job.recipe.controls}


def _measured(job: DistillationJob, name: Control, progress: Report | None) -> dict[str, Any]:
    store = job.store.within(f"control-{name}", control=name)
    kept = job.ranks.first(lambda: None if (record := store.get(DONE)) is None else record.entry)
    if kept is not None:
        return kept
    job.accelerator.free_memory()  # which keeps the models that it has shared out
    alone = replace(job, recipe=control_recipe(job.recipe, name), store=store)
    with job.ranks.agree_on_errors():
        run = alone.context(load_pair(job.pupil, job.teacher, alone.recipe, job.accelerator))
    run = replace(run, metrics=Metrics(store.folder / METRICS, job.accelerator, tracked=False))
    run, _ = taught(run, job.teacher, job.output)
    try:
        learned, _ = learned_from(run, progress)
        found = {"tokens": learned.tokens, "seconds": learned.seconds, **learned.history[-1]}
    except NumericsError as error:
        found = {"failed": str(error)}
    if job.ranks.rank == 0:
        store.put(DONE, found)
    return found


def control_recipe(recipe: Distillation, name: Control) -> Distillation:
    """Return the recipe of a control: all is as in `recipe` but the losses, that all text is the data's, and that
    nobody's predictions are cached or quantized where no loss reads them."""
    changes: dict[str, Any] = {"losses": CONTROLS[name], "balance": False, "controls": (), "on_policy": None}
    return recipe.model_copy(update=changes | ({"teacher": Teacher()} if name == "no_teacher" else {}))
