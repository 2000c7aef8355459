"""Scores of lm-eval's tasks on a model in memory, and warnings on prompts that it cannot read whole."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import DiskError, InputError
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.tasks import (
    FAILURES,
    FoundTasks,
    contain_lm_eval,
    describe_failure,
    find_tasks,
    import_lm_eval,
    quiet_lm_eval,
)
from llmcompress.evaluation.uncertainty import mean
from llmcompress.runtime.ranks import noticing_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' name of its warning
Scores = dict[str, dict[str, float]]
Items = dict[str, dict[str, dict[Any, float]]]


@dataclass(frozen=True)
class TaskScores:
    """Scores of tasks. Of several processes, only the first has them."""

    scores: Scores = field(default_factory=dict)  # {task: {metric: value}}, with the number of items as "samples"
    items: Items = field(default_factory=dict)  # {task: {metric: {item: value}}}, for means over items
    results: dict[str, Any] = field(default_factory=dict)  # lm-eval's own, with its samples
    tracker: Any = None  # lm-eval's EvaluationTracker
    failure: str | None = None  # a sentence if tasks began, but did not finish
    warnings: tuple[str, ...] = ()  # on cut prompts

    def save(self, folder: Path, name: str) -> None:
        """Write the files that lm-eval's command writes with `--output_path FOLDER --log_samples` for the model `name`:
        `FOLDER/<name>/results_<date>.json` and `samples_<task>_<date>.jsonl`. Raises DiskError if that fails."""
        arguments = {"pretrained": name}
        logged = self.tracker.general_config_tracker
        logged.log_experiment_args("hf", arguments, None, logged.chat_template, logged.fewshot_as_multiturn)
        results = {key: value for key, value in self.results.items() if key != "samples"}
        results["config"] = {**results["config"], "model": "hf", "model_args": arguments}
        self.tracker.output_path = str(folder)
        samples = self.results["samples"]
        with quiet_lm_eval():
            self.tracker.save_results_aggregated(results, samples)
            for task in results["configs"]:
                self.tracker.save_results_samples(task, samples[task])
        written = [path.name.rpartition("_")[0] for path in folder.glob("*/*.json*")]
        if sorted(written) != sorted(["results", *(f"samples_{task}" for task in results["configs"])]):
            raise DiskError(f"lm-eval could not write all of its files to {folder}; check the disk and start again")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes = ALONE,
    tasks: FoundTasks | None = None,
) -> TaskScores:
    """Run the tasks of `protocol`, if it names any; `tasks`: the result of `find_tasks`, whose errors it may raise.

    Standard output, global random states, the environment, the tokenizer and the model's mode stay as they were. An
    error of lm-eval or of a task's own code becomes the `failure` of the result.
    """
    tasks = find_tasks(tokenizer, protocol, processes.count) if tasks is None else tasks
    if tasks is None:
        return TaskScores()
    try:
        return _run(model, tokenizer, protocol, processes, tasks)
    except FAILURES as error:
        sentence = describe_failure(error, protocol.tasks, "failed")
        if processes.count > 1:  # others wait in exchanges of lm-eval
            with noticing_ends():
                if "onnection closed" in str(error):  # as gloo says
                    raise error
            raise InputError(sentence) from error
        return TaskScores(failure=f"{sentence}; what was scored besides stands")


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    processes: Processes,
    tasks: FoundTasks,
) -> TaskScores:
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(contain_lm_eval())
        evaluator, _, model_class, tracker_class = import_lm_eval()
        stack.enter_context(_quick_facts(evaluator))
        own = copy.deepcopy(tokenizer)
        own.deprecation_warnings[TOO_LONG] = True  # `cut_prompts` counts the prompts that lm-eval cuts
        wrapped = model_class(pretrained=model, tokenizer=own, batch_size=protocol.batch_size)
        wrapped.tok_decode = functools.partial(_decode_whole, own)
        if processes.accelerator is not None:
            # HFLM sets these itself when it loads a model by name; for one in memory it leaves them to its caller
            # ("custom distributed integration"), without an argument for them.
            wrapped.accelerator = processes.accelerator
            wrapped._rank, wrapped._world_size = processes.rank, processes.count
        tracker = tracker_class()
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=tasks.load(),
            task_manager=tasks.manager,
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


def _decode_whole(tokenizer: Any, tokens: Any, skip_special_tokens: bool = True) -> str:
    """Return the text of tokens with the space that it may begin with: some tokenizers strip it, programs need it."""
    mark = tokenizer("a", add_special_tokens=False).input_ids
    ids = [*mark, *([tokens] if isinstance(tokens, int) else tokens)]
    whole: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return whole.removeprefix(tokenizer.decode(mark))


def _scores(results: dict[str, Any]) -> Scores:
    """Return the numbers of lm-eval's result; a standard error may be "N/A", keys are "metric,filter"."""
    scores: Scores = {}
    counts = results.get("n-samples", {})
    for task, entry in results.get("results", {}).items():
        metrics = {_metric(key): float(value) for key, value in _numbers(entry)}
        if metrics:
            scored = counts.get(task, {}).get("effective", entry.get("sample_len"))
            scores[task] = metrics | ({"samples": scored} if scored is not None else {})
    return scores


def _items(results: dict[str, Any]) -> Items:
    """Return the values behind lm-eval's means, by task and number of the item; a group has those of its tasks.

    Scores that are no mean of single numbers (of a corpus, a perplexity) have none.
    """
    items: Items = {}
    for task, entry in results["results"].items():
        samples = [(leaf, row) for leaf in _leaves(task, results) for row in results["samples"].get(leaf, ())]
        for key, value in _numbers(entry):
            metric, _, kind = key.partition(",")
            values = {
                (leaf, row["doc_id"]): float(row[metric])
                for leaf, row in samples
                if row["filter"] == kind and isinstance(row.get(metric), Real)
            }
            if values and math.isclose(mean(list(values.values())), value, rel_tol=1e-9, abs_tol=1e-12):
                items.setdefault(task, {})[_metric(key)] = values
    return items


def _leaves(task: str, results: dict[str, Any]) -> list[str]:
    """Return the tasks with items that `task` consists of: itself, or those of a group, and of the groups in it."""
    children = results.get("group_subtasks", {}).get(task)
    return [leaf for child in children for leaf in _leaves(child, results)] if children else [task]


def _numbers(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the metrics in lm-eval's entry for a task, under its own keys."""
    for key, value in entry.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "sample_len":
            yield key, value


def _metric(key: str) -> str:
    """Return "acc" for "acc,none"; another filter stays in the name."""
    return key.removesuffix(",none")


@contextlib.contextmanager
def _quick_facts(evaluator: Any) -> Iterator[None]:
    """Let lm-eval read the commit of the working folder from its files, and describe the environment once.

    git would complain of a folder without a commit.
    """
    from lm_eval.loggers.utils import get_commit_from_path
    from torch.utils import collect_env

    commit, environment = evaluator.get_git_commit_hash, collect_env.get_pretty_env_info
    evaluator.get_git_commit_hash = lambda: get_commit_from_path(os.getcwd())
    collect_env.get_pretty_env_info = _environment
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, collect_env.get_pretty_env_info = commit, environment


@functools.cache
def _environment() -> str:
    """Return torch's description of the environment, for which it starts pip and tools of GPUs: a second each time."""
    from torch.utils import collect_env

    return collect_env.pretty_str(collect_env.get_env_info())


def cut_prompts(samples: Mapping[str, Sequence[Mapping[str, Any]]], harness: Any) -> Iterator[str]:
    """Yield a sentence for each task with prompts whose first tokens lm-eval cut off; an item counts once.

    `samples`: of each task; `harness`: lm-eval's model.
    """
    for task, rows in samples.items():
        items = {row["doc_id"]: row["arguments"] for row in rows}  # every filter has the same
        cut = [item for item, requests in items.items() if any(_is_cut(request, harness) for request in requests)]
        if cut:
            answer = max(_answer_tokens(request, harness) for request in items[cut[0]])
            room = f"{harness.max_length} tokens" + (f", less {answer} for the answer" if answer else "")
            yield (
                f"{len(cut)} of {len(items)} prompts of {task} are longer than the model's {room}; the first tokens "
                f"were cut"
            )


def _is_cut(request: tuple[Any, ...], harness: Any) -> bool:
    """True for the arguments of a request that lm-eval's HFLM shortens."""
    match request:
        case (str(prompt), dict()):
            return len(harness.tok_encode(prompt)) > harness.max_length - _answer_tokens(request, harness)
        case (str(prompt), str(answer)) if prompt:  # an answer that is longer by itself is an error
            return len(harness.tok_encode(prompt + answer)) > harness.max_length + 1  # the last token is not read
        case _:  # a text whose perplexity is taken is read window by window
            return False


def _answer_tokens(request: tuple[Any, ...], harness: Any) -> int:
    """Return the tokens of the context that are reserved for the answer."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if not isinstance(request[-1], dict):
        return 0
    return int(normalize_gen_kwargs(request[-1], harness.max_gen_toks)["max_gen_toks"])
