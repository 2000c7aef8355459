"""Scores of models in memory: perplexity, tasks, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmcompress.evaluate.distance import Distance, distance
from llmcompress.evaluate.lm_eval import FoundTasks, Items, TaskScores, find_tasks, run_tasks
from llmcompress.evaluate.logits import Counting, OnDisk, Readable
from llmcompress.evaluate.perplexity import Perplexity, evaluation_windows, perplexity
from llmcompress.evaluate.processes import ALONE, Processes
from llmcompress.evaluate.protocol import STANDARD, Protocol
from llmcompress.evaluate.uncertainty import paired
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Scoring = Callable[[str, int, int], None]  # (what is counted, done, in all); in all 0 where that is unknown


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model. `distance`: to the teacher, None without one."""

    perplexity: Perplexity
    tasks: TaskScores
    distance: Distance | None

    def to_json(self) -> dict[str, Any]:
        """Return perplexity, tokens, calibration_error, tasks {name: {metric: value}}, kl and top1_agreement, with
        standard errors but for the third; as "tasks_failed" a sentence where tasks did not come to an end."""
        far = self.distance
        return {
            **({} if self.tasks.failure is None else {"tasks_failed": self.tasks.failure}),
            "perplexity": self.perplexity.value,
            "perplexity_stderr": self.perplexity.stderr,
            "tokens": self.perplexity.tokens,
            "calibration_error": self.perplexity.calibration_error,
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
    model: Readable,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol = STANDARD,
    *,
    against: Readable | None = None,
    processes: Processes = ALONE,
    progress: Scoring | None = None,
    tasks: FoundTasks | None = None,
) -> Evaluation:
    """Score `model` on the text and the tasks of `protocol`, and measure its distance to the teacher `against`.

    Text is read block by block: see `window_logits`. For tasks the whole model is in memory, decoded. `processes` share
    the work; every one of them has to call this. `progress` receives ("block", blocks passed, blocks), ("window",
    windows read, windows) and, before tasks, ("tasks", 0, 0). `tasks`: those of the protocol, if they were looked for
    before the model was loaded.
    """
    tasks = find_tasks(tokenizer, protocol) if tasks is None else tasks
    if against is not None:
        return _beside(against, model, tokenizer, protocol, processes, progress, tasks)[1]
    ids = evaluation_windows(tokenizer, protocol, model.config)
    with _ready(model, protocol) as model:
        score = perplexity(model, ids, 1, processes, _counting(progress, "window"), _counting(progress, "block"))
        with _told(score, None):
            return Evaluation(score, _on_tasks(model, tokenizer, protocol, processes, progress, tasks), None)


def evaluate_all(
    reference: Readable,
    others: Sequence[Callable[[], Readable]],
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol = STANDARD,
    *,
    processes: Processes = ALONE,
    progress: Scoring | None = None,
    tasks: FoundTasks | None = None,
) -> list[Evaluation]:
    """Score the reference and one or more others; all distances are those from the reference, which comes first.

    The others are functions that load a model; one at a time is in memory beside the reference. `progress`: as for
    `evaluate`, for each of the others, and for the reference's tasks. `tasks`: as for `evaluate`.
    """
    tasks = find_tasks(tokenizer, protocol) if tasks is None else tasks
    found = [_beside(reference, load(), tokenizer, protocol, processes, progress, tasks) for load in others]
    own, _ = found[0]
    with _ready(reference, protocol) as reference:
        scores = _on_tasks(reference, tokenizer, protocol, processes, progress, tasks)
    return [Evaluation(own, scores, Distance.to_itself(own)), *(other for _, other in found)]


def _beside(
    teacher: Readable,
    student: Readable,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    progress: Scoring | None,
    tasks: FoundTasks | None,
) -> tuple[Perplexity, Evaluation]:
    """Return the teacher's perplexity and the student's evaluation."""
    ids = evaluation_windows(tokenizer, protocol, teacher.config, student.config)
    with _ready(student, protocol) as student:
        counting = _counting(progress, "window"), _counting(progress, "block")
        far = distance(teacher, student, ids, 1, processes, *counting)
        with _told(far.student, far):
            scores = _on_tasks(student, tokenizer, protocol, processes, progress, tasks)
        return far.teacher, Evaluation(far.student, scores, far)


@contextmanager
def _ready(model: Readable, protocol: Protocol) -> Iterator[Readable]:
    """Give the model that text, and tasks if there are any, are read by: for tasks the whole one, decoded."""
    if not protocol.tasks:
        yield model
        return
    whole = model.load() if isinstance(model, OnDisk) else model
    with decoded(whole):
        yield whole


def _on_tasks(
    model: Readable,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    progress: Scoring | None,
    tasks: FoundTasks | None,
) -> TaskScores:
    """Announce the tasks, if there are any, and run them."""
    if isinstance(model, OnDisk):  # there are none: see `_ready`
        return TaskScores()
    if progress is not None and protocol.tasks:
        progress("tasks", 0, 0)
    return run_tasks(model, tokenizer, protocol, processes, tasks)


@contextmanager
def _told(score: Perplexity, far: Distance | None) -> Iterator[None]:
    """Tell what was measured already to whoever stops the tasks."""
    with ExitStack() as stack:
        stack.push(partial(_note, f"perplexity {score.value:.4f}" + ("" if far is None else f" and KL {far.kl:.5f}")))
        yield


def _note(measured: str, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    if error is not None:
        error.add_note(f"measured before the tasks: {measured}")


def _counting(progress: Scoring | None, what: str) -> Counting | None:
    return None if progress is None else partial(progress, what)
