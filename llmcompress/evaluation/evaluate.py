"""The evaluation of models: perplexity, tasks, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmcompress.evaluation.distance import Distance, distance
from llmcompress.evaluation.lm_eval import Items, TaskScores, run_tasks
from llmcompress.evaluation.logits import Counting, OnDisk, Readable
from llmcompress.evaluation.perplexity import Perplexity, perplexity, windows_by_text
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import STANDARD, Protocol
from llmcompress.evaluation.tasks import FoundTasks, find_tasks
from llmcompress.evaluation.uncertainty import paired_difference
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Scoring = Callable[[str, int, int], None]  # (what is counted, done, in all); in all 0 where that is unknown


@dataclass(frozen=True)
class TextScores:
    """Scores of one model on one text. `distance`: to the teacher, None without one."""

    perplexity: Perplexity
    distance: Distance | None

    @staticmethod
    def of(distance: Distance) -> TextScores:
        """Return the scores of the student of a distance."""
        return TextScores(distance.student, distance)

    def to_json(self) -> dict[str, Any]:
        """Return perplexity, tokens, calibration_error, kl and top1_agreement, and their standard errors."""
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
    """Scores of one model on tasks, and on texts by kind; under None those on the protocol's own text."""

    tasks: TaskScores
    texts: Mapping[str | None, TextScores]

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
        return {name: scores.distance for name, scores in self.texts.items() if scores.distance is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the scores on the text as `TextScores` does, tasks {name: {metric: value}}, domains {name: scores}.

        "tasks_failed" is a sentence if tasks did not finish, and "warnings" are on cut prompts.
        """
        return {
            **({} if self.tasks.failure is None else {"tasks_failed": self.tasks.failure}),
            **({"warnings": list(self.tasks.warnings)} if self.tasks.warnings else {}),
            **self.texts[None].to_json(),
            "tasks": self.tasks.scores,
            "domains": {name: scores.to_json() for name, scores in self.texts.items() if name is not None},
        }

    def differences(self, reference: Evaluation) -> dict[str, Any]:
        """Return {"nll": difference, "tasks": {name: {metric: difference}}} to `reference`, of the same protocol.

        Entries are `uncertainty.Difference`; that of perplexity is in nats per token, of its logarithm. Metrics that
        are no means over items have none.
        """
        text = asdict(paired_difference(reference.perplexity.windows, self.perplexity.windows))
        return {"nll": text, "tasks": _task_differences(reference.tasks.items, self.tasks.items)}


def _task_differences(reference: Items, model: Items) -> dict[str, dict[str, Any]]:
    differences: dict[str, dict[str, Any]] = {}
    for task, metrics in reference.items():
        for metric, wanted in metrics.items():
            given = model.get(task, {}).get(metric, {})
            if given.keys() == wanted.keys():
                change = paired_difference(list(wanted.values()), [given[item] for item in wanted])
                differences.setdefault(task, {})[metric] = asdict(change)
    return differences


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
    windows read, windows) and, before tasks, ("tasks", 0, 0). `tasks`: those of the protocol, if already found.
    """
    tasks = find_tasks(tokenizer, protocol, processes.count) if tasks is None else tasks
    return _Evaluator(tokenizer, protocol, processes, progress, tasks).evaluate(model, against)


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
    tasks = find_tasks(tokenizer, protocol, processes.count) if tasks is None else tasks
    evaluator = _Evaluator(tokenizer, protocol, processes, progress, tasks)
    evaluations = [evaluator.evaluate(load(), reference) for load in others]
    with evaluator.prepare_model(reference) as reference:
        scores = evaluator.run_tasks(reference)
    distances = evaluations[0].distances().items()
    own = {name: TextScores.of(Distance.to_itself(distance.teacher)) for name, distance in distances}
    return [Evaluation(scores, own), *evaluations]


@dataclass(frozen=True)
class _Evaluator:
    """Everything but the models: the tokenizer, the protocol, and the processes that share the work."""

    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    processes: Processes
    progress: Scoring | None
    tasks: FoundTasks | None

    def evaluate(self, model: Readable, teacher: Readable | None) -> Evaluation:
        """Return the scores of a model, with its distance to a teacher if there is one."""
        readers = [model.config] if teacher is None else [teacher.config, model.config]
        windows = windows_by_text(self.tokenizer, self.protocol, *readers)
        with self.prepare_model(model) as model, ExitStack() as stack:
            texts = {name: self._score_text(model, teacher, ids) for name, ids in windows.items()}
            stack.push(partial(_note_scores, texts[None]))
            return Evaluation(self.run_tasks(model), texts)

    @contextmanager
    def prepare_model(self, model: Readable) -> Iterator[Readable]:
        """Yield the model in the form that texts and tasks are read by: for tasks whole and decoded."""
        if not self.protocol.tasks:
            yield model
            return
        whole = model.load() if isinstance(model, OnDisk) else model
        with decoded(whole):
            yield whole

    def _score_text(self, model: Readable, teacher: Readable | None, ids: Tensor) -> TextScores:
        counters = self._counter("window"), self._counter("block")
        if teacher is None:
            return TextScores(perplexity(model, ids, 1, self.processes, *counters), None)
        return TextScores.of(distance(teacher, model, ids, 1, self.processes, *counters))

    def _counter(self, unit: str) -> Counting | None:
        return None if self.progress is None else partial(self.progress, unit)

    def run_tasks(self, model: Readable) -> TaskScores:
        """Announce the tasks, if there are any, and run them on a prepared model."""
        if isinstance(model, OnDisk):  # without tasks: see `prepare_model`
            return TaskScores()
        if self.progress is not None and self.protocol.tasks:
            self.progress("tasks", 0, 0)
        return run_tasks(model, self.tokenizer, self.protocol, self.processes, self.tasks)


def _note_scores(scores: TextScores, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    """Add the scores on the text to an error that stops the tasks."""
    if error is not None:
        kl = "" if scores.distance is None else f" and KL {scores.distance.kl:.5f}"
        error.add_note(f"measured before the tasks: perplexity {scores.perplexity.value:.4f}{kl}")
