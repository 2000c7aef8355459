"""Output of other libraries while a command runs: their bars become progress of ours, their warnings a line each."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llmcompress.errors import first_line

LOG, DEEPSPEED = logging.getLogger("llmcompress"), logging.getLogger("DeepSpeed")
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@contextmanager
def contain_others(warn: Callable[[Iterable[str]], None]) -> Iterator[None]:
    """Log every bar of tqdm as our own progress, and pass each other warning once to `warn`, as one line.

    Warnings that are for developers alone are left out, and so are those of DeepSpeed, which at every import says that
    there is no GPU.
    """
    from tqdm.std import tqdm

    begin, display, show_warning = tqdm.__init__, tqdm.display, warnings.showwarning
    shown: set[str] = set()

    def begin_unseen(bar: Any, *args: Any, **settings: Any) -> None:
        settings |= {"file": io.StringIO(), "disable": bool(settings.get("disable"))}  # None: unless on a terminal
        begin(bar, *args, **settings)

    def log_bar(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:
        name, done, total = (bar.desc or "step").strip(" :"), int(bar.n), int(bar.total or 0)
        if msg == "" or pos == 0:  # it is closed
            done = total = total or 1
        LOG.info("%s %d/%d", name, done, total, extra={"progress": (name, done, total)})
        return True

    def show_once(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        sentence = first_line(message) if isinstance(message, Warning) else message
        if not issubclass(category, FOR_DEVELOPERS) and sentence not in shown:
            shown.add(sentence)
            warn([sentence])

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    tqdm.__init__, tqdm.display, warnings.showwarning = begin_unseen, log_bar, show_once
    DEEPSPEED.addFilter(is_error)
    try:
        yield
    finally:
        tqdm.__init__, tqdm.display, warnings.showwarning = begin, display, show_warning
        DEEPSPEED.removeFilter(is_error)
