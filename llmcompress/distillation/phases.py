"""The phases of a distillation, one after the other: each trains its part of the compressed result of the one before.

A recipe without phases is one end-to-end phase. Several keep their states in folders of their own, so an interrupted
run resumes in the phase that was under way, after its last state or block.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.blockwise.walk import recover_blocks
from llmcompress.distillation.context import Report, TrainContext
from llmcompress.distillation.held_out import evaluate_held_out
from llmcompress.distillation.parallel.fsdp_shards import shrink
from llmcompress.distillation.parallel.launch import is_given
from llmcompress.distillation.student.learned_masks import learned_masks
from llmcompress.distillation.student.low_rank import adapt, rounded, teachers_weights
from llmcompress.distillation.student.model import check_latents, relaxed_student
from llmcompress.distillation.student.regrow import Masks, grow, input_norms, pruned_again, regrown
from llmcompress.distillation.train import train
from llmcompress.errors import RecipeError
from llmcompress.recipe.sections import RANK
from llmcompress.weight.modules import CompressedLinear, Multiplying, decoded, put
from llmcompress.weight.trainable.latents import ValuesForm

LOG = logging.getLogger(__name__)


@dataclass
class Learned:
    """The result of all phases: compressed linears, and what is not compressed, by name; the student holds both, too.

    `trained`: the largest number of parameters of each kind that one phase changed; `history`: looks at the held-out
    sequences; `phases`: {kind, steps, seconds, blocks: the errors of each, frozen: the number of codes, regrown: the
    share of new weights in its masks} of every phase; `steps`: end to end.
    """

    linears: dict[str, Multiplying] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0  # predicted, end to end
    seconds: float = 0.0

    def add(self, linears: Mapping[str, Multiplying], dense: Mapping[str, Tensor], trained: Mapping[str, int]) -> None:
        """Add what a phase learned."""
        self.linears |= linears
        self.dense |= dense
        self.trained |= {kind: max(count, self.trained.get(kind, 0)) for kind, count in trained.items()}


def learn(run: TrainContext, report: Report | None = None) -> Learned:
    """Go through the phases of `run.recipe` with the compressed model of `run.student`, in place.

    Raises RecipeError for a block-wise phase in several processes, and for options of codes that the student lacks; and
    what `train` and `recover_blocks` raise.
    """
    stages = run.recipe.stages()
    alone = {"a blockwise phase": any(kind == "blockwise" for kind, _ in stages)}
    alone["regrow"] = any(recipe.regrow is not None for _, recipe in stages)
    for option, there in alone.items():
        if there and run.accelerator.num_processes > 1:
            raise RecipeError(
                f"{option} runs in one process, and {run.accelerator.num_processes} were started; put it into a recipe "
                f"of its own, and start from its output"
            )
    for _, recipe in stages:
        check_latents(run.student.model, recipe)
    learned = Learned()
    for number, (kind, recipe) in enumerate(stages, start=1):
        store = run.store if len(stages) == 1 else run.store.within(f"phase-{number}", phase=number)
        before = sum(phase["steps"] for phase in learned.phases)
        metrics = run.metrics.of_phase(number, before) if len(stages) > 1 else run.metrics
        part = replace(run, recipe=recipe, store=store, metrics=metrics)
        model, [done] = run.student.model, [len(learned.history)]
        adapted = () if recipe.adapt is None else adapt(model, recipe.adapt, run.dense(), recipe.seed)
        masks = {} if recipe.regrow is None else grow(model, recipe.regrow, run.dense())
        if kind == "blockwise":
            _by_blocks(part, learned, report)
        else:
            _end_to_end(part, learned, report, _learning(part, masks))
        if recipe.adapt is not None:
            _keep(part, learned, rounded(learned.linears, adapted, recipe.adapt), "rounded")
        if recipe.regrow is not None:
            norms = _norms(run, masks) if recipe.regrow.by == "input_norms" else None
            _keep(part, learned, pruned_again(learned.linears, masks, norms), "pruned")
            learned.phases[-1]["regrown"] = regrown(learned.linears, masks)
        if len(stages) > 1:
            learned.history[done:] = [{"phase": number, **row} for row in learned.history[done:]]
    return learned


def lacking(trained: Mapping[Any, object]) -> tuple[str, ...]:
    """Return a warning of the kinds in `rates` of which a student has none; `trained`: what it has of each, or how
    many."""
    missing = [kind for kind, found in trained.items() if not found]
    return (f"rates: the student has no {' and no '.join(missing)} to train; the rest learns alone",) if missing else ()


def _learning(run: TrainContext, masks: Masks) -> dict[str, ValuesForm]:
    """Return the forms in which grown linears train whose masks learn, by name."""
    asked = run.recipe.regrow
    if asked is None or asked.by != "learned":
        return {}
    return learned_masks(masks, _norms(run, masks), asked.rank or RANK)


def _norms(run: TrainContext, masks: Masks) -> dict[str, Tensor]:
    """Return the squared norms of the inputs of the linears that masks are of, on the training text, by name."""
    return input_norms(run.student.model, masks, run.data.sequences, run.autocast)


def _end_to_end(run: TrainContext, learned: Learned, report: Report | None, values: Mapping[str, ValuesForm]) -> None:
    recipe = run.recipe
    latents = teachers_weights(run.student.model, run.dense()) if recipe.latents == "teacher" else None
    shrunk = shrink if is_given(run.accelerator) else None
    student = relaxed_student(
        run.student.model, recipe.rates, recipe.estimator, latents, scales=recipe.scales, values=values, shrunk=shrunk
    )
    if run.ranks.rank == 0 and run.metrics.tracked:  # a control has the same rates
        for warning in lacking(student.trained):
            LOG.warning(warning)
    measured = train(replace(run, student=student), report)
    numbers: dict[str, int] = {
        kind: sum(value.numel() for value in values.values()) for kind, values in student.trained.items()
    }
    learned.add(student.freeze_into_model(), student.dense(), numbers)
    learned.history += measured.history
    learned.steps += measured.step
    learned.tokens += measured.targets
    learned.seconds += measured.seconds
    frozen = {} if measured.frozen is None else {"frozen": measured.frozen}
    learned.phases.append({"kind": "end_to_end", "steps": measured.step, "seconds": measured.seconds, **frozen})


def _by_blocks(run: TrainContext, learned: Learned, report: Report | None) -> None:
    recipe = run.recipe
    first = {**_look(run, 0), "tokens": 0}
    kl = first["kl"]
    run.metrics.start(0, begun=False)
    run.metrics.add(first)
    batch = Batch.join([run.data.sequences, *run.data.held_out])
    if batch.documents is not None:
        raise RecipeError(
            "a blockwise phase cannot keep documents apart; set boundaries: false in data, or leave it out"
        )
    walked = recover_blocks(
        run.student.model,
        run.dense(),
        batch.ids,
        batch.read,
        len(batch) - len(run.data.sequences),
        recipe,
        run.store,
        run.autocast,
        None if report is None else lambda done, blocks, found, speed: report(done, blocks, found.after, speed, kl),
    )
    learned.add(walked.linears, walked.dense, walked.trained)
    seconds = sum(walked.seconds)
    tokens = run.steps * recipe.batch * run.data.sequences.targets // len(run.data.sequences)  # of every block
    learned.history += [first, {**_look(run, run.steps), "tokens": tokens, "seconds": seconds}]
    frozen = {} if recipe.freezing is None else {"frozen": sum(found.frozen for found in walked.blocks.values())}
    run.metrics.add({**learned.history[-1], **({"codes": frozen} if frozen else {})})
    learned.seconds += seconds
    blocks = {path: found.to_json() for path, found in walked.blocks.items()}
    learned.phases.append({"kind": "blockwise", "steps": run.steps, "seconds": seconds, **frozen, "blocks": blocks})


def _look(run: TrainContext, step: int) -> dict[str, Any]:
    """Run `evaluate_held_out`, decoding every weight once."""
    with decoded(run.student.model), decoded(run.teacher):
        return evaluate_held_out(run, step)


def _keep(run: TrainContext, learned: Learned, changed: Mapping[str, CompressedLinear], done: str) -> None:
    """Put linears that were changed after a phase into the model and the result; measure again, if there are any.

    `done`: what the metrics call the change.
    """
    for name, layer in changed.items():
        put(run.student.model, name, layer)
    if changed:
        learned.linears |= changed
        last = learned.history[-1]
        learned.history.append({**last, **_look(run, last["step"])})
        run.metrics.add({**learned.history[-1], done: True})
