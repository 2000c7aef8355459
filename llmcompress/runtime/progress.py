"""Progress of work deep in the library: logged, and shown by a command as a stage or as a part of one.

In a notebook, a job shows one line that is replaced as the work goes on: IPython shows a text under a name and replaces
it later, which works in every front end, with ipywidgets or without. Scripts and terminals stay quiet.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LOG = logging.getLogger("llmcompress")
PIECE = 1 << 24  # bytes of a file that are read at a time
PAUSE = 0.2  # seconds between two versions of the line


def count_steps(counted: str, total: int) -> Callable[[], None]:
    """Return a function to be called after each of `total` steps; it logs how many are done, at INFO, 0 at once.

    `counted`: what is done in a step, such as "gradient". The record's `progress` is (counted, done, total). A total of
    1 is a stage of which no part can be counted.
    """
    done = -1

    def step() -> None:
        nonlocal done
        done += 1
        LOG.info("%s %d/%d", counted, done, total, extra={"progress": (counted, done, total)})

    step()
    return step


def count_each(items: Collection[T], counted: str) -> Iterator[T]:
    """Yield the items, and count each as a step once the caller is done with it."""
    step = count_steps(counted, len(items))
    for item in items:
        yield item
        step()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest = sha256()
    with path.open("rb") as file:
        step = count_steps(f"digest of {path.name}", -(-path.stat().st_size // PIECE))
        while piece := file.read(PIECE):
            digest.update(piece)
            step()
    return digest.hexdigest()


class ReplacedLine:
    """A line whose text `show` replaces, not more often than a reader can see, but always the last time."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display, self._shown = display, 0.0
        self._handle: Any = None

    def show(self, text: str, last: bool = False) -> None:
        """Show a text in place of the one before."""
        if self._handle is None:
            self._handle = self._display({"text/plain": text}, raw=True, display_id=True)
        elif last or time.monotonic() - self._shown >= PAUSE:
            self._handle.update({"text/plain": text}, raw=True)
        else:
            return
        self._shown = time.monotonic()


def in_notebook() -> Callable[..., Any] | None:
    """Return IPython's `display` if this process is the kernel of a notebook, else None."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Callable[..., Any] = ipython.display.display
    return display


def progress_line(name: str, *units: str) -> Callable[..., None] | None:
    """Return a function of (done, total, numbers...) that shows these with the `units` of the numbers.

    None outside of notebooks. `name`: the kind of the counted things.
    """
    display = in_notebook()
    if display is None:
        return None
    line = ReplacedLine(display)

    def progress(done: int, total: int, *numbers: float) -> None:
        parts = [f"{name} {done}/{total}", *(f"{number:,.4g} {unit}" for number, unit in zip(numbers, units))]
        line.show(" · ".join(parts), last=done == total)

    return progress


def progress_lines() -> Callable[[str, int, int], None] | None:
    """Return a function of (name, done, total) that shows a line for each name; None outside of notebooks.

    A total of 0 is unknown.
    """
    display = in_notebook()
    if display is None:
        return None
    lines: dict[str, ReplacedLine] = {}

    def progress(name: str, done: int, total: int) -> None:
        line = lines.setdefault(name, ReplacedLine(display))
        line.show(f"{name} {done}/{total}" if total else f"{name} ...", last=done == total)

    return progress
