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
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from llmcompress.errors import InputError, RecipeError
from llmcompress.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAIRS = "llmcompress_pairs"
PAIRS_FILE = Path(__file__).with_name("minimal_pairs.jsonl")
Scores = dict[str, dict[str, float]]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    chat_template: bool = False,
) -> Scores:
    """{task: {metric: value}}, with the number of scored items as "samples".

    A task is a name that lm-eval knows, "llmcompress_pairs", a .yaml file, a folder of them, or a .jsonl file of
    minimal pairs. A YAML file may name Python functions, which lm-eval then runs: use files you trust. `limit` scores
    the first items only (a share below 1, else a number): not a result to quote. Standard output, global random
    states, the environment, the tokenizer and the model's mode are left as they were. Raises RecipeError when lm-eval
    is missing or a task is unknown, InputError when a task cannot be loaded.
    """
    if not tasks:
        return {}
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError("lm-eval needs a tokenizer with a BOS or EOS token to start sentences from; this has neither")
    training = model.training
    with _contained():
        evaluator, manager_class, model_class = _lm_eval()
        loaded, manager = _load(manager_class, tasks)
        wrapped = model_class(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            bootstrap_iters=100,  # standard errors of means need none; the slow ones are capped by this
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=None,  # NumPy's global generator stays as it is
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    model.train(training)
    return _scores(results)


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
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number} is no minimal pair; it has to be an object with sentence_good and sentence_bad"
            ) from error
    if not pairs:
        raise InputError(f"{path} has no minimal pairs; write one object with sentence_good and sentence_bad per line")
    return pairs


def _lm_eval() -> tuple[Any, Any, Any]:
    """lm-eval's evaluator module, TaskManager and HFLM, imported when needed: it is large."""
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f'tasks need lm-eval ({error}): pip install "llmcompress[eval]"') from error
    return evaluator, TaskManager, HFLM


def _load(manager_class: Any, tasks: Sequence[str]) -> tuple[list[Any], Any]:
    """What to pass to lm-eval as tasks, and the task manager that knows them."""
    from datasets.exceptions import DatasetsError

    folders = [Path(task).expanduser() for task in tasks if Path(task).expanduser().is_dir()]
    local = [_local(task) for task in tasks]
    try:
        # Scanning lm-eval's own thousands of tasks takes seconds: only when one of them is asked for.
        manager = manager_class(include_path=[str(folder) for folder in folders], include_defaults=None in local)
        inside = {folder: manager_class(include_path=str(folder), include_defaults=False) for folder in folders}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"the task files cannot be read ({_short(error)})") from error
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
    try:
        loaded = manager.load(specs)
    except (OSError, ValueError, KeyError, TypeError, ImportError, yaml.YAMLError, DatasetsError) as error:
        raise InputError(f"the tasks {', '.join(tasks)} cannot be loaded ({_short(error)})") from error
    return (specs if loaded.get("groups") else list(loaded["tasks"].values())), manager


def _local(task: str) -> dict[str, Any] | str | Path | None:
    """The config of minimal pairs, the path of a YAML file, or a folder; None for a name that lm-eval has to know."""
    path = Path(task).expanduser()
    if task == PAIRS:
        return minimal_pairs_task(PAIRS_FILE, PAIRS)
    if path.suffix == ".jsonl":
        return minimal_pairs_task(path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"there is no task file {task}")
        return str(path.resolve())
    return path if path.is_dir() else None


def _scores(results: dict[str, Any] | None) -> Scores:
    """lm-eval's result without what is not a number: a standard error may be "N/A", keys are "metric,filter"."""
    scores: Scores = {}
    counts = (results or {}).get("n-samples", {})
    for task, entry in (results or {}).get("results", {}).items():
        metrics = {}
        for key, value in entry.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and metric != "sample_len":
                metrics[metric if kind in ("", "none") else key] = float(value)
        if metrics:
            scored = counts.get(task, {}).get("effective", entry.get("sample_len"))
            scores[task] = metrics | ({"samples": scored} if scored is not None else {})
    return scores


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keeps lm-eval's habits inside: printing, progress bars where nobody looks, seeding, setting variables."""
    screen = sys.stderr if sys.stderr.isatty() else io.StringIO()
    environment, state = dict(os.environ), random.getstate()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with (
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
        torch.random.fork_rng(devices=devices),
    ):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
            random.setstate(state)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


def _short(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
