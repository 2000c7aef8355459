"""Failures of tasks in a sentence. Tasks are other people's files, templates, code and data.

lm-eval passes on bare errors of templates and libraries, such as "string index out of range". The traceback tells the
task, the item, and the line of the task's own code.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from llmcompress.errors import first_line
from llmcompress.recipe.yaml import fault

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
