"""The phases of a distillation, one after the other: each trains its part of the compressed result of the one before.

A recipe without phases is one end-to-end phase. Each of several has a folder of its own for its states, so an
interrupted run resumes in the phase that was under way, after its last state or block.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.blockwise import recover_blocks
from llmcompress.distillation.context import Report, TrainContext
from llmcompress.distillation.held_out import evaluate_held_out
from llmcompress.distillation.parallel.fsdp import drop_values
from llmcompress.distillation.parallel.launch import receives_shares
from llmcompress.distillation.student.learned_masks import learned_masks
from llmcompress.distillation.student.low_rank import add_terms, round_terms, teacher_weights
from llmcompress.distillation.student.model import PROJECTIONS, check_latents, relaxed_student
from llmcompress.distillation.student.nested import check_nested, split_terms
from llmcompress.distillation.student.regrow import SEQUENCES, Masks, grow, input_norms, prune_again, regrown_share
from llmcompress.distillation.teacher.cache import measure_cache_bias
from llmcompress.distillation.train import train
from llmcompress.errors import RecipeError
from llmcompress.recipe.sections import RANK
from llmcompress.weight.modules import CompressedLinear, Multiplying, decoded, put
from llmcompress.weight.trainable.latents import ValuesForm
from llmcompress.weight.trainable.relax import Relaxation

LOG = logging.getLogger(__name__)


@dataclass
class PhasesResult:
    """The result of all phases: compressed linears, and other tensors, by name; the student holds both, too.

    `trained`: the largest number of parameters of each kind that one phase changed; `history`: looks at the held-out
    sequences; `phases`: {kind, steps, seconds, blocks: the errors of each, frozen: the number of codes, regrown: the
    share of new weights in its masks} of every phase; `steps`, and `tokens` predicted in them: end to end;
    `cache_bias`: see `measure_cache_bias`, before and after.
    """

    linears: dict[str, Multiplying] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cache_bias: dict[str, dict[str, float]] | None = None

    def add(self, linears: Mapping[str, Multiplying], dense: Mapping[str, Tensor], trained: Mapping[str, int]) -> None:
        """Add the weights of a phase, and how many of each kind it trained."""
        self.linears |= linears
        self.dense |= dense
        self.trained |= {kind: max(count, self.trained.get(kind, 0)) for kind, count in trained.items()}


def run_phases(run: TrainContext, report: Report | None = None) -> PhasesResult:
    """Go through the phases of `run.recipe` with the compressed model of `run.student`, in place.

    Raises RecipeError for an option that runs in one process alone, and for options of codes that the student lacks;
    and what `train` and `recover_blocks` raise.
    """
    stages = run.recipe.stages()
    _check_processes(run)
    for _, recipe in stages:
        check_latents(run.student.model, recipe)
    result = PhasesResult()
    cached = run.recipe.teacher.kind == "cached"
    before = measure_cache_bias(run) if cached else {}
    for number, (kind, recipe) in enumerate(stages, start=1):
        part, looks = replace(run, recipe=recipe), len(result.history)
        if len(stages) > 1:
            steps = sum(phase["steps"] for phase in result.phases)
            store = run.store.within(f"phase-{number}", phase=number)
            part = replace(part, store=store, metrics=replace(run.metrics, phase=number, before=steps))
        _run_phase(part, kind, result, report)
        if len(stages) > 1:
            result.history[looks:] = [{"phase": number, **row} for row in result.history[looks:]]
    if cached:
        result.cache_bias = {"before": before, "after": measure_cache_bias(run)}
    result.linears = split_terms(result.linears, run.recipe.nested)
    return result


def _check_processes(run: TrainContext) -> None:
    stages, processes = run.recipe.stages(), run.accelerator.num_processes
    options = {
        "a blockwise phase": any(kind == "blockwise" for kind, _ in stages),
        "regrow": any(recipe.regrow is not None for _, recipe in stages),
    }
    for option, used in options.items():
        if used and processes > 1:
            raise RecipeError(
                f"{option} runs in one process, and {processes} were started; put it into a recipe of its own, and "
                f"start from its output"
            )


def _run_phase(run: TrainContext, kind: str, result: PhasesResult, report: Report | None) -> None:
    recipe, model = run.recipe, run.student.model
    adapted = () if recipe.adapt is None else add_terms(model, recipe.adapt, run.dense_teacher, recipe.seed)
    masks = {} if recipe.regrow is None else grow(model, recipe.regrow, run.dense_teacher)
    if kind == "blockwise":
        _run_blocks(run, result, report)
    else:
        _run_end_to_end(run, result, report, _mask_forms(run, masks))
    if recipe.adapt is not None:
        _put_linears(run, result, round_terms(result.linears, adapted, recipe.adapt, recipe.nested), "rounded")
    if recipe.regrow is not None:
        norms = _norms(run, masks) if recipe.regrow.by == "input_norms" else None
        _put_linears(run, result, prune_again(result.linears, masks, norms), "pruned")
        result.phases[-1]["regrown"] = regrown_share(result.linears, masks)


def missing_kinds(trained: Mapping[Any, object]) -> tuple[str, ...]:
    """Return a warning of the kinds in `rates` of which a student has none. `trained`: its parameters of each kind, or
    their number."""
    missing = [kind for kind, values in trained.items() if not values]
    return (f"rates: the student has no {' and no '.join(missing)} to train; the rest learns alone",) if missing else ()


def _warn_of_missing(run: TrainContext, trained: Mapping[Any, object]) -> None:
    """Warn as `missing_kinds` does, but of projections, which training adds."""
    if run.ranks.rank == 0 and run.metrics.tracked:  # a control has the same rates
        for warning in missing_kinds({kind: values for kind, values in trained.items() if kind != PROJECTIONS}):
            LOG.warning(warning)


def _mask_forms(run: TrainContext, masks: Masks) -> dict[str, ValuesForm]:
    """Return the forms in which grown linears train whose masks learn, by name."""
    regrow = run.recipe.regrow
    if regrow is None or regrow.by != "learned":
        return {}
    return learned_masks(masks, _norms(run, masks), regrow.rank or RANK)


def _norms(run: TrainContext, masks: Masks) -> dict[str, Tensor]:
    """Return the squared norms of the inputs of masked linears on the training text, by name."""
    return input_norms(run.student.model, masks, run.data.first(SEQUENCES), run.autocast)


def _run_end_to_end(
    run: TrainContext, result: PhasesResult, report: Report | None, values: Mapping[str, ValuesForm]
) -> None:
    recipe = run.recipe
    check_nested(run.student.model, recipe.nested)
    student = relaxed_student(
        run.student.model,
        recipe.rates,
        teacher_weights(run.student.model, run.dense_teacher()) if recipe.latents == "teacher" else None,
        scales=recipe.scales,
        relaxation=Relaxation(frozenset(), recipe.estimator),
        values=values,
        drop_values=drop_values if receives_shares(run.accelerator) else None,
    )
    _warn_of_missing(run, student.trained)
    progress = train(replace(run, student=student), report)
    numbers: dict[str, int] = {
        kind: sum(value.numel() for value in values.values()) for kind, values in student.trained.items()
    }
    result.add(student.freeze_into_model(), student.dense(), numbers)
    result.history += progress.history
    result.steps += progress.step
    result.tokens += progress.targets
    result.seconds += progress.seconds
    frozen = {} if progress.frozen is None else {"frozen": progress.frozen}
    result.phases.append({"kind": "end_to_end", "steps": progress.step, "seconds": progress.seconds, **frozen})


def _run_blocks(run: TrainContext, result: PhasesResult, report: Report | None) -> None:
    first = {**_look(run, 0), "tokens": 0}
    kl = first["kl"]
    run.metrics.start(0, begun=False)
    run.metrics.add(first)
    text, sequences = Batch.join([run.data.sequences, *run.data.held_out]), len(run.data.sequences)
    recovered = recover_blocks(
        run,
        text,
        len(text) - sequences,
        None if report is None else lambda done, blocks, errors, speed: report(done, blocks, errors.after, speed, kl),
    )
    _warn_of_missing(run, recovered.trained)
    result.add(recovered.linears, recovered.dense, recovered.trained)
    seconds = sum(recovered.seconds)
    tokens = run.steps * run.recipe.batch * run.data.sequences.targets // sequences  # of every block
    result.history += [first, {**_look(run, run.steps), "tokens": tokens, "seconds": seconds}]
    frozen = {}
    if run.recipe.freezing is not None:
        frozen = {"frozen": sum(errors.frozen for errors in recovered.errors.values())}
    run.metrics.add({**result.history[-1], **({"codes": frozen} if frozen else {})})
    result.seconds += seconds
    blocks = {path: errors.to_json() for path, errors in recovered.errors.items()}
    result.phases.append({"kind": "blockwise", "steps": run.steps, "seconds": seconds, **frozen, "blocks": blocks})


def _look(run: TrainContext, step: int) -> dict[str, Any]:
    """Run `evaluate_held_out`, decoding every weight once."""
    with decoded(run.student.model), decoded(run.teacher):
        return evaluate_held_out(run, step)


def _put_linears(run: TrainContext, result: PhasesResult, linears: Mapping[str, CompressedLinear], mark: str) -> None:
    """Put linears that changed after a phase into the model and the result; measure again, if there are any.

    `mark`: the name of the change in the metrics.
    """
    for name, layer in linears.items():
        put(run.student.model, name, layer)
    if linears:
        result.linears |= linears
        last = result.history[-1]
        result.history.append({**last, **_look(run, last["step"])})
        run.metrics.add({**result.history[-1], mark: True})
