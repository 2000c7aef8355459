"""The tasks of a protocol: found by name, in YAML files or in .jsonl files, and checked.

`llmcompress_pairs` is our own small task: 168 English sentences, each with an ungrammatical twin, 12 for each of 14
phenomena; the model is right where the good sentence is likelier. It needs no network.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from llmcompress.data.chat import render_chat
from llmcompress.errors import InputError, RecipeError, first_line
from llmcompress.evaluation.local_tasks import PAIRS, PAIRS_FILE, local_task
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.task_failures import FAILURES, describe_failure
from llmcompress.recipe.yaml import fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval does not look into


@dataclass(frozen=True)
class FoundTasks:
    """Tasks in lm-eval's form. They are loaded anew for every model, since lm-eval edits them."""

    specs: Sequence[Any]
    manager: Any

    def load(self) -> list[Any]:
        """Return the tasks with their data."""
        loaded = self.manager.load(list(self.specs))
        return list(self.specs) if loaded.get("groups") else list(loaded["tasks"].values())


def find_tasks(tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> FoundTasks | None:
    """Return the tasks of `protocol`, loaded once as a check; None if it names none.

    A task is a name that lm-eval knows, "llmcompress_pairs", a .yaml file, a .jsonl file of `local_tasks`, or a folder
    of files of either form. A YAML file may name Python functions, which lm-eval then runs: use files you trust. Raises
    RecipeError if lm-eval is missing, a task unknown or the tokenizer unsuitable, InputError for a task that cannot be
    loaded.
    """
    if not protocol.tasks:
        return None
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError("lm-eval needs a tokenizer with a BOS or EOS token to start sentences from; this has neither")
    if protocol.chat_template and tokenizer.chat_template is None:
        raise RecipeError("the model's tokenizer has no chat template; score it without one")
    if protocol.chat_template:
        render_chat([{"role": "user", "content": "?"}], tokenizer)  # lm-eval would wait for one that never ends
    with contain_lm_eval():
        return _locate_tasks(import_lm_eval()[1], protocol)


def _locate_tasks(manager_class: Any, protocol: Protocol) -> FoundTasks:
    """Return the tasks with the task manager that knows them, after loading them once."""
    from datasets.exceptions import DatasetsError

    tasks = protocol.tasks
    local = [_local_task(task, protocol) for task in tasks]
    folders = [spec for spec in local if isinstance(spec, Path)]
    for sentence in (sentence for folder in folders for sentence in _yaml_faults(folder)):
        raise InputError(sentence)
    try:
        # Scanning lm-eval's own thousands of tasks takes seconds: only when one of them is asked for.
        manager = manager_class(include_path=[str(folder) for folder in folders], include_defaults=None in local)
        inside = {folder: manager_class(include_path=str(folder), include_defaults=False) for folder in folders}
    except (OSError, ValueError) as error:
        raise InputError(f"the task files cannot be read ({first_line(error)})") from error
    specs: list[Any] = []
    for task, spec in zip(tasks, local):
        if isinstance(spec, Path):
            if not inside[spec].all_subtasks:
                raise InputError(f"the folder {task} has no task files (.yaml with a `task` key, or .jsonl)")
            specs.extend(inside[spec].all_subtasks)
        elif spec is None and task not in manager.all_tasks:
            near = difflib.get_close_matches(task, [*manager.all_tasks, PAIRS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "list lm-eval's with `lm-eval ls tasks`"
            raise RecipeError(f"there is no task {task!r}; {hint}")
        else:
            specs.append(task if spec is None else spec)
    try:
        _check_examples(manager.load(specs)["tasks"].values(), protocol.num_fewshot)
    except (*FAILURES, yaml.YAMLError, DatasetsError) as error:
        raise InputError(describe_failure(error, tasks, "cannot be loaded")) from error
    return FoundTasks(specs, manager)


def _local_task(task: str, protocol: Protocol) -> dict[str, Any] | str | Path | None:
    """Return the config of .jsonl files, the path of a YAML file, or a folder; None for lm-eval's own tasks."""
    path = Path(os.path.expanduser(task))
    if task == PAIRS:
        return local_task([PAIRS_FILE], protocol, PAIRS)
    if path.suffix == ".jsonl":
        return local_task([path], protocol, path.stem)
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):
            raise InputError(f"there is no task file {task}")
        return str(path.resolve())
    if not os.path.isdir(path):
        return None
    files = [] if any(path.rglob("*.yaml")) else sorted(path.glob("*.jsonl"))
    return local_task(files, protocol, path.resolve().name) if files else path


def _yaml_faults(folder: Path) -> Iterator[str]:
    """Yield a sentence for each .yaml file of a folder that is not YAML, which lm-eval would silently leave out."""
    for path in sorted(folder.rglob("*.yaml")):
        if not IGNORED.intersection(path.parts):
            try:
                with path.open("rb") as file:
                    for _ in yaml.parse(file, yaml.SafeLoader):
                        pass
            except yaml.YAMLError as error:
                yield fault(error)


def _check_examples(tasks: Iterable[Any], num_fewshot: int | None) -> None:
    """Raise RecipeError for a task with fewer examples than its prompts need; None for the task's own number."""
    for task in tasks:
        own = task.config.num_fewshot
        number = own if num_fewshot is None or own == 0 else num_fewshot  # lm-eval leaves a 0 in a task's file alone
        sampler = getattr(task, "sampler", None)
        if not number or sampler is None:
            continue
        most = len(sampler.fewshot_docs()) - (task.fewshot_cfg.split == task.config.test_split)  # without the item
        if number > most:
            raise RecipeError(
                f"the task {task.config.task} has {most} examples for a prompt, and num_fewshot asks for {number}; "
                f"give at most {most}"
            )


def import_lm_eval() -> tuple[Any, Any, Any, Any]:
    """Import lm-eval, which is large: its evaluator module, TaskManager, HFLM and EvaluationTracker."""
    try:
        from lm_eval import evaluator
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f'tasks need lm-eval ({error}): pip install "llmcompress[eval]"') from error
    return evaluator, TaskManager, HFLM, EvaluationTracker


@contextlib.contextmanager
def contain_lm_eval() -> Iterator[None]:
    """Undo what lm-eval does to global random states and to the environment, and silence it."""
    environment, state = dict(os.environ), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with quiet_lm_eval(), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Suppress lm-eval's printing, and its progress bars outside of terminals."""
    screen = sys.stderr if sys.stderr.isatty() else io.StringIO()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
