"""Scores of models in memory: perplexity, tasks, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmcompress.evaluation.distance import Distance, distance
from llmcompress.evaluation.lm_eval import FoundTasks, Items, TaskScores, find_tasks, run_tasks
from llmcompress.evaluation.logits import Counting, OnDisk, Readable
from llmcompress.evaluation.perplexity import Perplexity, perplexity, windows_by_text
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import STANDARD, Protocol
from llmcompress.evaluation.uncertainty import paired
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Scoring = Callable[[str, int, int], None]  # (what is counted, done, in all); in all 0 where that is unknown


@dataclass(frozen=True)
class OnText:
    """Scores of one model on one text. `distance`: to the teacher, None without one."""

    perplexity: Perplexity
    distance: Distance | None

    @staticmethod
    def of(far: Distance) -> OnText:
        """Return the scores of the student of a distance."""
        return OnText(far.student, far)

    def to_json(self) -> dict[str, Any]:
        """Return perplexity, tokens, calibration_error, kl and top1_agreement, with standard errors but for the
        second and the third."""
        far = self.distance
        return {
            "perplexity": self.perplexity.value,
            "perplexity_stderr": self.perplexity.stderr,
            "tokens": self.perplexity.tokens,
            "calibration_error": self.perplexity.calibration_error,
            "kl": None if far is None else far.kl,
            "kl_stderr": None if far is None else far.kl_stderr,
            "top1_agreement": None if far is None else far.top1_agreement,
            "top1_agreement_stderr": None if far is None else far.top1_agreement_stderr,
        }


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model: on tasks, and on texts, by kind; under None those on the protocol's own text."""

    tasks: TaskScores
    texts: Mapping[str | None, OnText]

    @property
    def perplexity(self) -> Perplexity:
        """The perplexity on the protocol's text."""
        return self.texts[None].perplexity

    @property
    def distance(self) -> Distance | None:
        """The distance to the teacher on the protocol's text; None without a teacher."""
        return self.texts[None].distance

    def distances(self) -> dict[str | None, Distance]:
        """Return the distances to the teacher by kind of text; none without a teacher."""
        return {name: one.distance for name, one in self.texts.items() if one.distance is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the scores on the text as `OnText` does, tasks {name: {metric: value}}, domains {name: scores on it},
        as "tasks_failed" a sentence where tasks did not come to an end, and as "warnings" those on cut prompts."""
        return {
            **({} if self.tasks.failure is None else {"tasks_failed": self.tasks.failure}),
            **({"warnings": list(self.tasks.warnings)} if self.tasks.warnings else {}),
            **self.texts[None].to_json(),
            "tasks": self.tasks.scores,
            "domains": {name: one.to_json() for name, one in self.texts.items() if name is not None},
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
    """Score `model` on the texts and the tasks of `protocol`, and measure its distance to the teacher `against`.

    Text is read block by block: see `window_logits`. For tasks the whole model is in memory, decoded. `processes` share
    the work; every one of them has to call this. `progress` receives ("block", blocks passed, blocks), ("window",
    windows read, windows) and, before tasks, ("tasks", 0, 0). `tasks`: those of the protocol, if they were looked for
    before the model was loaded.
    """
    tasks = find_tasks(tokenizer, protocol) if tasks is None else tasks
    if against is not None:
        return _beside(against, model, tokenizer, protocol, processes, progress, tasks)
    texts = windows_by_text(tokenizer, protocol, model.config)
    with _ready(model, protocol) as model:
        counting = _counting(progress, "window"), _counting(progress, "block")
        found = {name: OnText(perplexity(model, ids, 1, processes, *counting), None) for name, ids in texts.items()}
        with _told(found[None]):
            return Evaluation(_on_tasks(model, tokenizer, protocol, processes, progress, tasks), found)


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
    with _ready(reference, protocol) as reference:
        scores = _on_tasks(reference, tokenizer, protocol, processes, progress, tasks)
    own = {name: OnText.of(Distance.to_itself(one.teacher)) for name, one in found[0].distances().items()}
    return [Evaluation(scores, own), *found]


def _beside(
    teacher: Readable,
    student: Readable,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    progress: Scoring | None,
    tasks: FoundTasks | None,
) -> Evaluation:
    """Return the student's evaluation."""
    texts = windows_by_text(tokenizer, protocol, teacher.config, student.config)
    with _ready(student, protocol) as student:
        counting = _counting(progress, "window"), _counting(progress, "block")
        found = {
            name: OnText.of(distance(teacher, student, ids, 1, processes, *counting)) for name, ids in texts.items()
        }
        with _told(found[None]):
            return Evaluation(_on_tasks(student, tokenizer, protocol, processes, progress, tasks), found)


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
def _told(found: OnText) -> Iterator[None]:
    """Tell what was measured already to whoever stops the tasks."""
    far = "" if found.distance is None else f" and KL {found.distance.kl:.5f}"
    with ExitStack() as stack:
        stack.push(partial(_note, f"perplexity {found.perplexity.value:.4f}{far}"))
        yield


def _note(measured: str, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    if error is not None:
        error.add_note(f"measured before the tasks: {measured}")


def _counting(progress: Scoring | None, what: str) -> Counting | None:
    return None if progress is None else partial(progress, what)
