"""The tasks of a protocol: found by name, in YAML files or in .jsonl files, and checked; their failures in a sentence.

`llmcompress_pairs` is our own small task: 168 English sentences, each with an ungrammatical twin, 12 for each of 14
phenomena; the model is right where the good sentence is likelier. It needs no network.

Tasks are other people's files, templates, code and data, and lm-eval passes on their bare errors, such as "string index
out of range". The traceback tells the task, the item, and the line of the task's own code.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jinja2 import TemplateError

from llmcompress.data.chat import render_chat
from llmcompress.errors import InputError, RecipeError, first_line
from llmcompress.evaluation.local_tasks import PAIRS, PAIRS_FILE, local_task
from llmcompress.evaluation.protocol import Protocol
from llmcompress.recipe.yaml import fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval does not look into
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    TemplateError,
)
INLINE = "inline"  # lm-eval's word for a task without a file


@dataclass(frozen=True)
class FoundTasks:
    """Tasks in lm-eval's form. They are loaded anew for every model, since lm-eval edits them."""

    specs: Sequence[Any]
    manager: Any

    def load(self) -> list[Any]:
        """Return the tasks with their data."""
        loaded = self.manager.load(list(self.specs))
        return list(self.specs) if loaded.get("groups") else list(loaded["tasks"].values())


def find_tasks(tokenizer: PreTrainedTokenizerBase, protocol: Protocol, processes: int = 1) -> FoundTasks | None:
    """Return the tasks of `protocol`, loaded once as a check; None if it names none.

    A task is a name that lm-eval knows, "llmcompress_pairs", a .yaml file, a .jsonl file of `local_tasks`, or a folder
    of files of either form. A YAML file may name Python functions, which lm-eval then runs: use files you trust. Raises
    RecipeError if lm-eval is missing, a task unknown, of fewer items than `processes`, or the tokenizer unsuitable,
    InputError for a task that cannot be loaded.
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
        return _locate_tasks(import_lm_eval()[1], protocol, processes)


def _locate_tasks(manager_class: Any, protocol: Protocol, processes: int) -> FoundTasks:
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
        loaded = [task for spec in specs for task in manager.load([spec])["tasks"].items()]
        _check_examples((task for _, task in loaded), protocol.num_fewshot)
        if processes > 1:
            _check_items(loaded, protocol.limit, processes)
    except (*FAILURES, yaml.YAMLError, DatasetsError) as error:
        raise InputError(describe_failure(error, tasks, "cannot be loaded")) from error
    if twice := [name for name, count in Counter(name for name, _ in loaded).items() if count > 1]:
        raise RecipeError(
            f"two tasks are called {twice[0]!r}, and their scores would be one; rename one, or leave it out"
        )
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
    files = [] if any(path.rglob("[!.]*.yaml")) else sorted(path.glob("[!.]*.jsonl"))
    return local_task(files, protocol, path.resolve().name) if files else path


def _yaml_faults(folder: Path) -> Iterator[str]:
    """Yield a sentence for each .yaml file of a folder that is not YAML, which lm-eval would silently leave out."""
    for path in sorted(folder.rglob("[!.]*.yaml")):
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


def _check_items(tasks: Iterable[tuple[str, Any]], limit: float | None, processes: int) -> None:
    """Raise RecipeError for a task that leaves a process without an item, which lm-eval takes for a broken task."""
    for name, task in tasks:
        items = len(task.eval_docs)
        if limit is not None:
            items = math.ceil(items * limit) if limit < 1 else min(items, int(limit))
        if items < processes:
            raise RecipeError(f"the task {name} has {items} items for {processes} processes; start at most {items}")


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


def describe_failure(error: BaseException, tasks: Sequence[str], what: str) -> str:
    """Return a sentence on the task that failed; `what`: what happened to it, as in "cannot be loaded"."""
    known = _variables(error)
    spec, task, item = known.get(("_load_spec", "spec")), _task(known), _item(known)
    source = None if task is None else (task.config.metadata or {}).get("config_source")
    name = spec["task"] if isinstance(spec, dict) else spec
    if name is None and task is not None:
        name = task.config.task if source in (None, INLINE) else f"{task.config.task} of {source}"
    if (request := _request(error, known)) is not None:
        name, item = request.task_name, request.doc_id
    subject = f"the tasks {', '.join(tasks)}" if name is None and len(tasks) > 1 else f"the task {name or tasks[0]}"
    place = "" if item is None else f" at item {item}, counted from 0"
    return f"{subject} {what}{place} ({_own_line(error, source)}{_cause(error)})"


def _variables(error: BaseException) -> dict[tuple[str, str], Any]:
    """Return the variables of lm-eval's functions in a traceback, by (function, variable)."""
    known: dict[tuple[str, str], Any] = {}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith("lm_eval."):
            known |= {(frame.f_code.co_name, name): value for name, value in frame.f_locals.items()}
    return known


def _task(known: Mapping[tuple[str, str], Any]) -> Any:
    """Return the task that lm-eval was at; None where it was at none, or had not read its config yet."""
    from lm_eval.api.task import Task

    tasks = (value for (_, name), value in known.items() if name == "self" and isinstance(value, Task))
    return next((task for task in tasks if getattr(task, "config", None) is not None), None)


def _item(known: Mapping[tuple[str, str], Any]) -> int | None:
    """Return the number of the item that the task was at, as lm-eval counts; None where it was at none."""
    if ("__init__", "test_doc") in known:  # the first one is tried as a task is loaded
        return 0
    if _task(known) is None or ("apply_filters", "self") in known:
        return None
    item: int | None = known.get(("build_all_requests", "doc_id"), known.get(("evaluate", "doc_id")))
    return item


def _request(error: BaseException, known: Mapping[tuple[str, str], Any]) -> Any:
    """Return the request that lm-eval was tokenizing, or whose length it checked; None where it did neither."""
    texts: Any = tuple(known.get(("loglikelihood", name)) for name in ("context", "continuation"))
    if ("_loglikelihood_tokens", "self") in known:
        texts = known.get(("_loglikelihood_tokens", "_")) if isinstance(error, AssertionError) else None
    return next((request for request in known.get(("loglikelihood", "requests"), ()) if request.args == texts), None)


def _own_line(error: BaseException, source: str | None) -> str:
    """Return the last place in code beside the task's file `source`, as "file:line: "; empty where there is none."""
    if source in (None, INLINE):
        return ""
    folder = Path(source or "").parent
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if Path(frame.f_code.co_filename).is_relative_to(folder):
            return f"{frame.f_code.co_filename}:{line}: "
    return ""


def _cause(error: BaseException) -> str:
    """Return a library's message, or the code that raised the error if there is none."""
    if isinstance(error, yaml.YAMLError):
        return fault(error)
    said = first_line(error) if str(error).strip() else traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {said}"
