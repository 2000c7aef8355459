"""Scores of models in memory: perplexity, tasks, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmcompress.evaluate.distance import Distance, distance
from llmcompress.evaluate.lm_eval import Items, TaskScores, run_tasks
from llmcompress.evaluate.perplexity import Counting, Perplexity, evaluation_windows, perplexity
from llmcompress.evaluate.processes import ALONE, Processes
from llmcompress.evaluate.protocol import STANDARD, Protocol
from llmcompress.evaluate.uncertainty import paired
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Scoring = Callable[[str, int, int], None]  # (what is counted, done, in all); in all 0 where that is unknown


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model. `distance`: to the teacher, None without one."""

    perplexity: Perplexity
    tasks: TaskScores
    distance: Distance | None

    def to_json(self) -> dict[str, Any]:
        """Return perplexity, tokens, tasks {name: {metric: value}}, kl and top1_agreement, with standard errors."""
        far = self.distance
        return {
            "perplexity": self.perplexity.value,
            "perplexity_stderr": self.perplexity.stderr,
            "tokens": self.perplexity.tokens,
            "tasks": self.tasks.scores,
            "kl": None if far is None else far.kl,
            "kl_stderr": None if far is None else far.kl_stderr,
            "top1_agreement": None if far is None else far.top1_agreement,
            "top1_agreement_stderr": None if far is None else far.top1_agreement_stderr,
        }

    def differences(self, reference: Evaluation) -> dict[str, Any]:
        """Return {"nll": difference, "tasks": {name: {metric: difference}}} to `reference`, of the same protocol.

        Entries are `uncertainty.Difference`. That of perplexity is taken of its logarithm, in nats per token. Metrics
        that are no means over items have none.
        """
        text = asdict(paired(reference.perplexity.windows, self.perplexity.windows))
        return {"nll": text, "tasks": _task_differences(reference.tasks.items, self.tasks.items)}


def _task_differences(reference: Items, model: Items) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in reference.items():
        for metric, wanted in metrics.items():
            given = model.get(task, {}).get(metric, {})
            if given.keys() == wanted.keys():
                change = paired(list(wanted.values()), [given[item] for item in wanted])
                found.setdefault(task, {})[metric] = asdict(change)
    return found


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol = STANDARD,
    *,
    against: PreTrainedModel | None = None,
    processes: Processes = ALONE,
    progress: Scoring | None = None,
) -> Evaluation:
    """Score `model` on the text and the tasks of `protocol`, and measure its distance to the teacher `against`.

    Compressed layers stay decoded meanwhile, so they take the memory of dense ones. `processes` share the work; every
    one of them has to call this. `progress` receives ("window", windows read, windows) and, before tasks, ("tasks",
    0, 0).
    """
    if against is not None:
        return _beside(against, model, tokenizer, protocol, processes, progress)[1]
    ids = evaluation_windows(tokenizer, protocol, model.config)
    with decoded(model):
        score = perplexity(model, ids, processes=processes, progress=_counting(progress))
        return Evaluation(score, _on_tasks(model, tokenizer, protocol, processes, progress), None)


def evaluate_all(
    reference: PreTrainedModel,
    others: Sequence[Callable[[], PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol = STANDARD,
    *,
    processes: Processes = ALONE,
    progress: Scoring | None = None,
) -> list[Evaluation]:
    """Score the reference and one or more others; all distances are those from the reference, which comes first.

    The others are functions that load a model; one at a time is in memory beside the reference. `progress`: as for
    `evaluate`, for each of the others, and for the reference's tasks.
    """
    found = [_beside(reference, load(), tokenizer, protocol, processes, progress) for load in others]
    own, _ = found[0]
    with decoded(reference):
        tasks = _on_tasks(reference, tokenizer, protocol, processes, progress)
    return [Evaluation(own, tasks, Distance.to_itself(own)), *(other for _, other in found)]


def _beside(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    progress: Scoring | None,
) -> tuple[Perplexity, Evaluation]:
    """Return the teacher's perplexity and the student's evaluation."""
    ids = evaluation_windows(tokenizer, protocol, teacher.config, student.config)
    with decoded(student):
        with decoded(teacher):
            far = distance(teacher, student, ids, processes=processes, progress=_counting(progress))
        tasks = _on_tasks(student, tokenizer, protocol, processes, progress)
        return far.teacher, Evaluation(far.student, tasks, far)


def _on_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    progress: Scoring | None,
) -> TaskScores:
    """Announce the tasks, if there are any, and run them."""
    if progress is not None and protocol.tasks:
        progress("tasks", 0, 0)
    return run_tasks(model, tokenizer, protocol, processes)


def _counting(progress: Scoring | None) -> Counting | None:
    return None if progress is None else partial(progress, "window")
