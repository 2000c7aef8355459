"""lm-eval tasks on a model in memory: by name, from local YAML files, or minimal pairs from a .jsonl file.

`llmcompress_pairs` is our own small task: 168 English sentences, each with an ungrammatical twin, 12 for each of 14
phenomena; the model is right where the good sentence is likelier. It needs no network.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from llmcompress.data.chat import render_chat
from llmcompress.data.text import read_text
from llmcompress.errors import DiskError, InputError, RecipeError, first_line
from llmcompress.evaluation.cut_prompts import cut_prompts
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.task_failures import FAILURES, check_examples, failure, yaml_faults
from llmcompress.evaluation.uncertainty import mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' name of its warning
PAIRS = "llmcompress_pairs"
PAIRS_FILE = Path(__file__).with_name("minimal_pairs.jsonl")
Scores = dict[str, dict[str, float]]
Items = dict[str, dict[str, dict[Any, float]]]


@dataclass(frozen=True)
class TaskScores:
    """Scores of tasks. Where several processes work, the first has all of them and the others none."""

    scores: Scores = field(default_factory=dict)  # {task: {metric: value}}, with the number of items as "samples"
    items: Items = field(default_factory=dict)  # {task: {metric: {item: value}}} of metrics that are means over items
    results: dict[str, Any] = field(default_factory=dict)  # lm-eval's own, with its samples
    tracker: Any = None  # lm-eval's EvaluationTracker
    failure: str | None = None  # a sentence where tasks were found and began, but did not come to an end
    warnings: tuple[str, ...] = ()  # on prompts that were cut

    def save(self, folder: Path, name: str) -> None:
        """Write what lm-eval's command with `--output_path FOLDER --log_samples` would write for the model `name`.

        `FOLDER/<name>/results_<date>.json` and `samples_<task>_<date>.jsonl`. Raises DiskError where that fails.
        """
        arguments = {"pretrained": name}
        logged = self.tracker.general_config_tracker
        logged.log_experiment_args("hf", arguments, None, logged.chat_template, logged.fewshot_as_multiturn)
        results = {key: value for key, value in self.results.items() if key != "samples"}
        results["config"] = {**results["config"], "model": "hf", "model_args": arguments}
        self.tracker.output_path = str(folder)
        samples = self.results["samples"]
        with _quiet():
            self.tracker.save_results_aggregated(results, samples)
            for task in results["configs"]:
                self.tracker.save_results_samples(task, samples[task])
        written = [path.name.rpartition("_")[0] for path in folder.glob("*/*.json*")]
        if sorted(written) != sorted(["results", *(f"samples_{task}" for task in results["configs"])]):
            raise DiskError(f"lm-eval could not write all of its files to {folder}; check the disk and start again")


@dataclass(frozen=True)
class FoundTasks:
    """Tasks that are there, as lm-eval takes them. They are loaded for every model anew, since lm-eval edits them."""

    specs: Sequence[Any]
    manager: Any

    def load(self) -> list[Any]:
        """Return the tasks with their data."""
        loaded = self.manager.load(list(self.specs))
        return list(self.specs) if loaded.get("groups") else list(loaded["tasks"].values())


def find_tasks(tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> FoundTasks | None:
    """Find and load the tasks of `protocol` before a model is looked at; None if it names none.

    A task is a name that lm-eval knows, "llmcompress_pairs", a .yaml file, a folder of them, or a .jsonl file of
    minimal pairs. A YAML file may name Python functions, which lm-eval then runs: use files you trust. Raises
    RecipeError when lm-eval is missing, a task is unknown or the tokenizer does not suit, InputError when a task cannot
    be loaded.
    """
    if not protocol.tasks:
        return None
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError("lm-eval needs a tokenizer with a BOS or EOS token to start sentences from; this has neither")
    if protocol.chat_template and tokenizer.chat_template is None:
        raise RecipeError("the model's tokenizer has no chat template; score it without one")
    if protocol.chat_template:
        render_chat([{"role": "user", "content": "?"}], tokenizer)  # lm-eval would wait for one that never ends
    with _contained():
        return _found(_lm_eval()[1], protocol)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes = ALONE,
    found: FoundTasks | None = None,
) -> TaskScores:
    """Run the tasks of `protocol`, if it names any; `found`: what `find_tasks` returns, and raises what it raises.

    Standard output, global random states, the environment, the tokenizer and the model's mode are left as they were.
    What lm-eval or a task's own code cannot do is the `failure` of the result.
    """
    found = find_tasks(tokenizer, protocol) if found is None else found
    if found is None:
        return TaskScores()
    try:
        return _run(model, tokenizer, protocol, processes, found)
    except FAILURES as error:
        said = failure(error, protocol.tasks, "failed")
        return TaskScores(failure=f"{said}; what was scored besides stands")


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    found: FoundTasks,
) -> TaskScores:
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(_contained())
        evaluator, _, model_class, tracker_class = _lm_eval()
        stack.enter_context(_without_git(evaluator))
        own = copy.deepcopy(tokenizer)
        own.deprecation_warnings[TOO_LONG] = True  # said already: lm-eval cuts prompts, which `cut_prompts` counts
        wrapped = model_class(pretrained=model, tokenizer=own, batch_size=protocol.batch_size)
        if processes.accelerator is not None:
            # What HFLM sets itself when it loads the model by name. For one in memory it leaves this to its caller
            # ("custom distributed integration"): no argument, so the attributes that LM has for it.
            wrapped.accelerator = processes.accelerator
            wrapped._rank, wrapped._world_size = processes.rank, processes.count
        tracker = tracker_class()
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=found.load(),
            task_manager=found.manager,
            limit=protocol.limit,
            num_fewshot=protocol.num_fewshot,
            batch_size=protocol.batch_size,
            apply_chat_template=protocol.chat_template,
            bootstrap_iters=100,  # standard errors of means need none; the slow ones are capped by this
            evaluation_tracker=tracker,
            random_seed=protocol.seed,
            numpy_random_seed=None,  # NumPy's global generator stays as it is
            torch_random_seed=protocol.seed,
            fewshot_random_seed=protocol.seed,
        )
        if results is None:  # not the first process
            return TaskScores()
        cut = tuple(cut_prompts(results["samples"], wrapped))
    return TaskScores(_scores(results), _items(results), results, tracker, warnings=cut)


def minimal_pairs_task(path: Path, name: str | None = None) -> dict[str, Any]:
    """An lm-eval task config: which of `sentence_good` and `sentence_bad` in the lines of a .jsonl file is likelier.

    The task is called `name`, or as the file. Raises InputError when the file is not such a list of pairs.
    """
    pairs = _read_pairs(path)

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"validation": Dataset.from_list(pairs)}

    return {
        "task": name or path.stem,
        "custom_dataset": dataset,  # in memory: lm-eval's own loader would write a cache
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",  # the default, a space, would be glued to the front of both sentences
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _read_pairs(path: Path) -> list[dict[str, str]]:
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append({key: str(row[key]) for key in ("sentence_good", "sentence_bad")})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number} is no minimal pair; it has to be an object with sentence_good and sentence_bad"
            ) from error
        if "" in pairs[-1].values():
            raise InputError(f"{path}, line {number} is no minimal pair; both sentences have to have text")
    if not pairs:
        raise InputError(f"{path} has no minimal pairs; write one object with sentence_good and sentence_bad per line")
    return pairs


def _lm_eval() -> tuple[Any, Any, Any, Any]:
    """lm-eval's evaluator module, TaskManager, HFLM and EvaluationTracker, imported when needed: it is large."""
    try:
        from lm_eval import evaluator
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f'tasks need lm-eval ({error}): pip install "llmcompress[eval]"') from error
    return evaluator, TaskManager, HFLM, EvaluationTracker


def _found(manager_class: Any, protocol: Protocol) -> FoundTasks:
    """Return what lm-eval takes as tasks, with the task manager that knows them; loaded once, to see that they can."""
    from datasets.exceptions import DatasetsError

    tasks = protocol.tasks
    local = [_local(task) for task in tasks]
    folders = [one for one in local if isinstance(one, Path)]
    for wrong in (one for folder in folders for one in yaml_faults(folder)):
        raise InputError(wrong)
    try:
        # Scanning lm-eval's own thousands of tasks takes seconds: only when one of them is asked for.
        manager = manager_class(include_path=[str(folder) for folder in folders], include_defaults=None in local)
        inside = {folder: manager_class(include_path=str(folder), include_defaults=False) for folder in folders}
    except (OSError, ValueError) as error:
        raise InputError(f"the task files cannot be read ({first_line(error)})") from error
    specs: list[Any] = []
    for task, found in zip(tasks, local):
        if isinstance(found, Path):
            if not inside[found].all_subtasks:
                raise InputError(f"the folder {task} has no lm-eval task files (.yaml with a `task` key)")
            specs.extend(inside[found].all_subtasks)
        elif found is None and task not in manager.all_tasks:
            near = difflib.get_close_matches(task, [*manager.all_tasks, PAIRS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "list lm-eval's with `lm-eval ls tasks`"
            raise RecipeError(f"there is no task {task!r}; {hint}")
        else:
            specs.append(task if found is None else found)
    there = FoundTasks(specs, manager)
    try:
        check_examples(manager.load(specs)["tasks"].values(), protocol.num_fewshot)
    except (*FAILURES, yaml.YAMLError, DatasetsError) as error:
        raise InputError(failure(error, tasks, "cannot be loaded")) from error
    return there


def _local(task: str) -> dict[str, Any] | str | Path | None:
    """The config of minimal pairs, the path of a YAML file, or a folder; None for a name that lm-eval has to know."""
    path = Path(os.path.expanduser(task))
    if task == PAIRS:
        return minimal_pairs_task(PAIRS_FILE, PAIRS)
    if path.suffix == ".jsonl":
        return minimal_pairs_task(path)
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):
            raise InputError(f"there is no task file {task}")
        return str(path.resolve())
    return path if os.path.isdir(path) else None


def _scores(results: dict[str, Any]) -> Scores:
    """lm-eval's result without what is not a number: a standard error may be "N/A", keys are "metric,filter"."""
    scores: Scores = {}
    counts = results.get("n-samples", {})
    for task, entry in results.get("results", {}).items():
        metrics = {_metric(key): float(value) for key, value in _numbers(entry)}
        if metrics:
            scored = counts.get(task, {}).get("effective", entry.get("sample_len"))
            scores[task] = metrics | ({"samples": scored} if scored is not None else {})
    return scores


def _items(results: dict[str, Any]) -> Items:
    """The values that lm-eval's means are of, by the task and number of the item; a group's are its tasks' together.

    What is no mean of single numbers (a corpus score, a perplexity) has none.
    """
    found: Items = {}
    for task, entry in results["results"].items():
        samples = [(leaf, one) for leaf in _leaves(task, results) for one in results["samples"].get(leaf, ())]
        for key, value in _numbers(entry):
            metric, _, kind = key.partition(",")
            values = {
                (leaf, one["doc_id"]): float(one[metric])
                for leaf, one in samples
                if one["filter"] == kind and isinstance(one.get(metric), Real)
            }
            if values and math.isclose(mean(list(values.values())), value, rel_tol=1e-9, abs_tol=1e-12):
                found.setdefault(task, {})[_metric(key)] = values
    return found


def _leaves(task: str, results: dict[str, Any]) -> list[str]:
    """Return the tasks with items that `task` consists of: itself, or those of a group, and of the groups in it."""
    children = results.get("group_subtasks", {}).get(task)
    return [leaf for child in children for leaf in _leaves(child, results)] if children else [task]


def _numbers(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics in lm-eval's entry for a task, under its own keys."""
    for key, value in entry.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "sample_len":
            yield key, value


def _metric(key: str) -> str:
    """ "acc,none" -> "acc"; another filter stays in the name."""
    return key.removesuffix(",none")


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep lm-eval's habits inside: seeding and setting variables, and what `_quiet` keeps."""
    environment, state = dict(os.environ), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with _quiet(), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


@contextlib.contextmanager
def _without_git(evaluator: Any) -> Iterator[None]:
    """Let lm-eval read the commit of the working folder from its files; git would complain of a folder without one."""
    from lm_eval.loggers.utils import get_commit_from_path

    own = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: get_commit_from_path(os.getcwd())
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress printing, and progress bars where nobody looks."""
    screen = sys.stderr if sys.stderr.isatty() else io.StringIO()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
